"""Verifies an export: the foreign library loads it in a process without vlp_jax, and computes."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.handover import foreign
from vlp_jax.handover.artifacts import artifact_functions
from vlp_jax.interop import precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.transfer import Model
from vlp_jax.interop.trees import image_of, plain, to_tree
from vlp_jax.models.coca import CoCa
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import kept_patches, mask_from_noise
from vlp_jax.models.vit import VisionTransformer

# Format, up to its first "_" -> the distribution that loads it; None if none can be installed.
LIBRARIES: dict[str, str | None] = {
    "big": None,
    "hf": "transformers",
    "open": "open_clip_torch",
    "safetensors": "safetensors",
    "saved": "tensorflow",
    "stablehlo": "jax",
    "timm": "timm",
}
# Largest difference of unit vectors, features and logits, relative to our largest number (at least
# 1). Libraries round products in bfloat16 in different orders.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
BATCH = 3


def verify(
    format: str, model: Model, directory: Path, extras: Extras, dtype: str = "float32"
) -> dict[str, Any]:
    """Compares the outputs of the format's library with ours, on a fixed random batch.

    Returns:
      `{library, version, max_difference}`, or `{skipped: reason}` if the library is not available.

    Raises:
      UserError: the library cannot load the export, or computes something else.
    """
    library = LIBRARIES[format.split("_")[0]]
    if library is None:
        return {"skipped": f"no package of {format} can be installed to load it with"}
    # The library reads rounded weights. If ours were not rounded as well, the difference would
    # include the rounding, and hide errors of the conversion.
    rounded = Model(model.module, precision.rounded(model.params, extras.weights))
    inputs = batch_of(rounded, extras)
    answer, theirs = run_foreign(library, directory, inputs, format)
    if theirs is None:
        return answer
    if library in ("jax", "tensorflow"):
        # The parameters are rounded already, and float32 stores them as they are.
        whole = dataclasses.replace(extras, weights="float32")
        ours = {
            f.name: jax.jit(f.call)(f.weights, *(inputs[x.name] for x in f.inputs))
            for f in artifact_functions(model.module, rounded.params, whole)
        }
    elif format == "safetensors":
        ours = rounded.params
    else:
        ours = _computed(rounded, extras, inputs)
    difference = _difference(ours, theirs, f"{library} {answer['version']}")
    # Not `>`: a NaN compares as False, and must fail.
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"{library} {answer['version']} loads what was written as {format} and computes "
            f"something else: it differs by {difference:.3g}; nothing is kept; report this with "
            f"the config of the model, or try another version of {library}"
        )
    return {**answer, "max_difference": difference}


def batch_of(model: Model, extras: Extras) -> dict[str, np.ndarray]:
    """Makes a random batch, always the same for a model.

    Its keys are `image` (uint8), `pixels` (the same images normalized, channels first), `text`
    (of different lengths, with end of text and padding), `noise`, and the image tower's `pooling`.
    """
    rng, vit = np.random.default_rng(0), image_of(model.module)
    image = rng.integers(0, 256, (BATCH, *vit.image_size, 3), np.uint8)
    normalized = extras.pixels_of(model.module).normalize(jnp.asarray(image))
    pixels = np.asarray(normalized).transpose(0, 3, 1, 2)
    batch = {
        "image": image,
        "pixels": np.ascontiguousarray(pixels),
        "noise": rng.random((BATCH, vit.patches), np.float32),
        "pooling": np.asarray(vit.pooling),
    }
    if "text" in model.module.towers():
        text = model.module.text
        ids = rng.integers(0, text.vocab_size, (BATCH, text.context_length)).astype(np.int32)
        # An end of text or padding in the middle would end the text earlier than `end` below.
        ids[np.isin(ids, (text.eos_id, text.pad_id))] = min(3, text.vocab_size - 1)
        for row, end in zip(ids, rng.integers(1, text.context_length, BATCH), strict=True):
            row[end], row[end + 1 :] = text.eos_id, text.pad_id
        batch["text"] = ids
    return batch


def run_foreign(
    library: str, directory: Path, inputs: Mapping[str, np.ndarray], what: str
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """Returns the JSON that foreign/check.py prints in another process, and the outputs, if any."""
    program = Path(foreign.__file__).parent / "check.py"
    with tempfile.TemporaryDirectory() as scratch:
        there, back = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(there, **inputs)
        # -I ignores the current folder and PYTHONPATH, where vlp_jax may be.
        command = [sys.executable, "-I", "-B", program, library, directory.resolve(), there, back]
        done = subprocess.run(command, capture_output=True, text=True, cwd=scratch)
        if done.returncode:
            # The last line of a traceback names the error.
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"{library} does not load what was written as {what}: {reason}")
        # Libraries may print lines of their own before it.
        answer = json.loads(done.stdout.strip().splitlines()[-1])
        if "skipped" in answer:
            return answer, None
        with np.load(back, allow_pickle=False) as arrays:
            return answer, {name: arrays[name] for name in arrays.files}


def _difference(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], who: str
) -> float:
    """Computes the largest difference, relative to large numbers; a UserError for other shapes."""
    largest = 0.0
    if ours.keys() != theirs.keys():
        raise UserError(f"{who} gives {sorted(theirs)[:4]} instead of {sorted(ours)[:4]}")
    for name, array in ours.items():
        a, b = np.asarray(array, np.float32), np.asarray(theirs[name], np.float32)
        if a.shape != b.shape:
            raise UserError(f"{who} gives {name} the shape {b.shape} instead of {a.shape}")
        scale = max(1.0, float(np.max(np.abs(a), initial=0.0)))
        apart = float(np.max(np.abs(a - b), initial=0.0)) / scale
        # A comparison with NaN is False, so max() would ignore it.
        largest = max(largest, apart if np.isfinite(apart) else np.inf)
    return largest


def _computed(
    model: Model, extras: Extras, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Computes our outputs on the batch, in float32, with the names in foreign/check.py."""
    module = plain(model.module)
    apply, image = jax.jit(module.apply), inputs["image"]
    tree = {"params": to_tree(module, model.params)}
    if isinstance(module, MaskedAutoencoder):
        kept = kept_patches(module.image.patches, extras.mask_ratio)
        mask = mask_from_noise(jnp.asarray(inputs["noise"]), kept)
        return {"prediction": apply(tree, image, mask)}
    if isinstance(module, VisionTransformer):
        return {"features": apply(tree, inputs["pixels"].transpose(0, 2, 3, 1))}
    out = {name: np.asarray(x) for name, x in apply(tree, image, inputs["text"]).items()}
    logits = np.exp(out["logit_scale"]) * out["image"] @ out["text"].T + out["logit_bias"]
    outputs = {"image": out["image"], "text": out["text"], "logits": logits}
    if isinstance(module, CoCa):

        def score(module: CoCa, image: jax.Array, text: jax.Array) -> jax.Array:
            return module.score_tokens(text, module.look(image))

        scores = jax.jit(lambda *x: module.apply(*x, method=score))(tree, image, inputs["text"])
        outputs["scores"] = scores[:, :-1]  # open_clip does not score the token after the last one
    return outputs

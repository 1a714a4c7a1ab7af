"""Proof that others load what was written: their library computes, in a process without ours."""

from __future__ import annotations

import json
import os
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
from vlp_jax.handover.functions import artifact_functions
from vlp_jax.interop import precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.transfer import Model
from vlp_jax.interop.trees import image_of, plain, to_tree
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import kept_patches, mask_from_noise

# The distribution that loads a format; None where there is none to install.
LIBRARIES: dict[str, str | None] = {
    "big_vision": None,
    "hf": "transformers",
    "hf_clip": "transformers",
    "hf_siglip": "transformers",
    "hf_vit": "transformers",
    "hf_vit_mae": "transformers",
    "open_clip": "open_clip_torch",
    "safetensors": "safetensors",
    "saved_model": "tensorflow",
    "stablehlo": "jax",
    "timm": "timm",
}
ARTIFACTS = ("stablehlo", "saved_model")
# Of unit vectors, features and logits, relative to the largest of ours (at least 1). Products in
# bfloat16 are rounded elsewhere in another order.
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}
BATCH = 3


def verify(
    format: str, model: Model, directory: Path, extras: Extras, dtype: str = "float32"
) -> dict[str, Any]:
    """Compares what the format's library makes of a fixed random batch with what we do.

    Args:
      model: that was written, its parameters as they were before they were rounded.
      directory: where it is.
      extras: with which it was written.
      dtype: of the artifact's matrix products.

    Returns:
      `{library, version, max_difference}`, or `{skipped: reason}` where it cannot be tried.

    Raises:
      UserError: the library does not load it, or computes something else.
    """
    library = LIBRARIES[format]
    if library is None:
        return {"skipped": f"no package of {format} can be installed to load it with"}
    rounded = Model(model.module, precision.rounded(model.params, extras.weights))
    inputs = batch_of(rounded, extras)
    said, theirs = run_foreign(library, directory, inputs, format)
    if theirs is None:
        return said
    if format in ARTIFACTS:
        ours = _offered(rounded, extras, inputs)
    elif format == "safetensors":
        ours = rounded.params
    else:
        ours = _computed(rounded, extras, inputs)
    difference = _difference(ours, theirs, f"{library} {said['version']}")
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"{library} {said['version']} loads what was written as {format} and computes "
            f"something else: it differs by {difference:.3g}; nothing is kept; report this with "
            f"the config of the model, or try another version of {library}"
        )
    return {**said, "max_difference": difference}


def batch_of(model: Model, extras: Extras) -> dict[str, np.ndarray]:
    """Random images, texts and noise, always the same for a model: `image` uint8 and `pixels`
    normalized, channels first; `text`; `noise`; and how the image tower pools."""
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
        batch["text"] = _texts(rng, model.module.text)
    return batch


def _texts(rng: np.random.Generator, text: Any) -> np.ndarray:
    """Ids that end at different places, as those of a tokenizer do."""
    ids = rng.integers(0, text.vocab_size, (BATCH, text.context_length)).astype(np.int32)
    ids[np.isin(ids, (text.eos_id, text.pad_id))] = min(3, text.vocab_size - 1)
    for row, end in enumerate(rng.integers(1, text.context_length, BATCH)):
        ids[row, end] = text.eos_id
        ids[row, end + 1 :] = text.pad_id
    return ids


def run_foreign(
    library: str, directory: Path, inputs: Mapping[str, np.ndarray], what: str
) -> tuple[dict[str, Any], dict[str, np.ndarray] | None]:
    """What a library says and computes in a process of its own; nothing if it is not installed.

    Raises:
      UserError: it does not load the folder.
    """
    program = Path(foreign.__file__).parent / "check.py"
    with tempfile.TemporaryDirectory() as scratch:
        there, back = Path(scratch, "inputs.npz"), Path(scratch, "outputs.npz")
        np.savez(there, **inputs)
        done = subprocess.run(
            # -I: neither the current folder nor PYTHONPATH, where vlp_jax may be.
            [
                sys.executable,
                "-I",
                "-B",
                program,
                library,
                os.fspath(directory.resolve()),
                there,
                back,
            ],
            capture_output=True,
            text=True,
            cwd=scratch,
        )
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            raise UserError(f"{library} does not load what was written as {what}: {reason}")
        said = json.loads(done.stdout.strip().splitlines()[-1])
        if "skipped" in said:
            return said, None
        with np.load(back, allow_pickle=False) as arrays:
            return said, {name: arrays[name] for name in arrays.files}


def _difference(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray], who: str
) -> float:
    """The largest difference of two sets of arrays, relative where the numbers are large.

    Raises:
      UserError: they are not arrays of the same names and shapes.
    """
    largest = 0.0
    if ours.keys() != theirs.keys():
        raise UserError(f"{who} gives {sorted(theirs)[:4]} instead of {sorted(ours)[:4]}")
    for name, array in ours.items():
        a, b = np.asarray(array, np.float32), np.asarray(theirs[name], np.float32)
        if a.shape != b.shape:
            raise UserError(f"{who} gives {name} the shape {b.shape} instead of {a.shape}")
        scale = max(1.0, float(np.max(np.abs(a), initial=0.0)))
        apart = float(np.max(np.abs(a - b), initial=0.0)) / scale
        largest = max(largest, apart if np.isfinite(apart) else np.inf)
    return largest


def _offered(
    model: Model, extras: Extras, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The functions of an artifact on the batch, in float32 and not through the artifact."""
    whole = Extras(**{**vars(extras), "weights": "float32"})
    return {
        function.name: np.asarray(
            jax.jit(function.call)(function.weights, *(inputs[x.name] for x in function.inputs))
        )
        for function in artifact_functions(model.module, model.params, whole)
    }


def _computed(
    model: Model, extras: Extras, inputs: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """What our model makes of the batch, in float32, by the names that foreign/check.py gives."""
    module = plain(model.module)
    tree = {"params": to_tree(module, model.params)}
    if isinstance(module, MaskedAutoencoder):
        kept = kept_patches(module.image.patches, extras.mask_ratio)
        mask = mask_from_noise(jnp.asarray(inputs["noise"]), kept)
        return {"prediction": np.asarray(jax.jit(module.apply)(tree, inputs["image"], mask))}
    if isinstance(module, DualEncoder | CoCa):
        out = jax.jit(module.apply)(tree, inputs["image"], inputs["text"])
        out = {name: np.asarray(x) for name, x in out.items()}
        logits = np.exp(out["logit_scale"]) * out["image"] @ out["text"].T + out["logit_bias"]
        found = {"image": out["image"], "text": out["text"], "logits": logits}
        if isinstance(module, DualEncoder):
            return found
        seen = module.apply(tree, inputs["image"], method="look")
        scores = module.apply(tree, inputs["text"], seen, method="score_tokens")
        return found | {"scores": np.asarray(scores)[:, :-1]}
    pixels = np.asarray(inputs["pixels"]).transpose(0, 2, 3, 1)
    return {"features": np.asarray(jax.jit(module.apply)(tree, pixels))}

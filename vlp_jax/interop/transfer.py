"""Writes a model (or the part a format can express) to a folder, and reads it back as a test."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vlp_jax import interop
from vlp_jax.errors import UserError
from vlp_jax.interop import files, staging
from vlp_jax.interop.precision import rounded
from vlp_jax.interop.trees import Module, Params, image_of, plain, to_tree
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.masking import mask_from_noise
from vlp_jax.models.vit import VisionTransformer

TOLERANCE = 1e-4  # of the test: float32 sums in another order


def how_to_load(format: str, directory: Path) -> str:
    """Returns a line of Python that loads the folder of a written model."""
    line = interop.FORMATS[format].loaded_by
    return line.format(directory, architecture=architecture_in(directory))


def architecture_in(directory: Path) -> str:
    """Returns the class of `transformers` that a folder is for, or ""."""
    config = files.load_json_if_there(directory / "config.json")
    return config.get("architectures", [""])[0]


@dataclasses.dataclass(frozen=True)
class Model:
    """A module with its parameters, with stacked layers (see `vlp_jax.interop.trees`)."""

    module: Module
    params: Params


def fitting_part(format: str, model: Model) -> tuple[Model, str]:
    """Returns the model if a format can express its class, or else its image tower.

    If the format can express neither, it is the model, so that the format's check explains why.

    Returns:
      The model or tower, and a line about the parts left out ("" if there are none).
    """
    kinds = interop.format_named(format).kinds
    if isinstance(model.module, kinds) or VisionTransformer not in kinds:
        return model, ""
    params = {path: x for path, x in model.params.items() if path.startswith("image/")}
    left_out = sorted({path.split("/")[0] for path in model.params.keys() - params.keys()})
    return (
        Model(image_of(model.module), params),
        f"{format} holds an image tower alone; left out: {', '.join(left_out)}",
    )


def write_checked(
    format: str, model: Model, directory: Path, *, overwrite: bool, check: bool, **extras: Any
) -> tuple[list[Path], float | None]:
    """Writes a model to a new folder and, with `check`, reads it back and compares outputs.

    The model is in memory twice then. For `extras` see `vlp_jax.interop.write`.

    Returns:
      The files, and the largest difference of features of a random image and text, or None.

    Raises:
      UserError: the folder is not empty, `vlp_jax.interop.write` raises it, or the model that is
        read back computes something else.
    """
    with staging.staged(directory, overwrite) as folder:
        written, difference = write_into(format, model, folder, check=check, **extras)
    return [directory / path.relative_to(folder) for path in written], difference


def write_into(
    format: str, model: Model, directory: Path, *, check: bool, **extras: Any
) -> tuple[list[Path], float | None]:
    """Does the work of `write_checked` file by file in `directory`, which need not exist."""
    module = model.module
    written = interop.write(format, module, model.params, directory, **extras)
    if not check:
        return written, None
    again = interop.read(f"{format}:{directory}", like=module)
    read_back = again.module
    if isinstance(module, VisionTransformer):  # some formats do not store the pooling
        read_back = read_back.clone(pooling=module.pooling)
    weights = extras.get("weights", "float32")
    # Rounding to `weights` was asked for, so it must not count as a difference.
    as_written = Model(module, rounded(model.params, weights))
    difference = deviation(as_written, Model(read_back, again.params))
    # Not `>`: a NaN compares as False, and must fail.
    if not difference <= TOLERANCE:
        raise UserError(
            f"what was written as {format} was read back and computes something else: features "
            f"differ by {difference:.3g}; do not use it, and report this with the model's config"
        )
    return written, difference


def deviation(one: Model, other: Model) -> float:
    """Computes the largest absolute difference of two models' features of a random input.

    They are also compared before normalization, which would hide a wrong scale.
    """
    computed = [_features(model) for model in (one, other)]
    return max(float(np.max(np.abs(a - b))) for a, b in zip(*computed, strict=True))


def _features(model: Model) -> list[np.ndarray]:
    module, rng = plain(model.module), np.random.default_rng(0)
    vit = image_of(module)
    image = rng.integers(0, 256, (1, *vit.image_size, 3), np.uint8)
    if isinstance(module, VisionTransformer):
        inputs: tuple[Any, ...] = (jnp.asarray(image, jnp.float32) / 127.5 - 1,)
    elif isinstance(module, MaskedAutoencoder):
        noise = jnp.asarray(rng.random((1, vit.patches), np.float32))
        inputs = (image, mask_from_noise(noise, max(1, vit.patches // 4)))
    else:
        text = rng.integers(0, module.text.vocab_size, (1, module.text.context_length), np.int32)
        # Pooling at the end of text needs one. In the last place it lets every token count.
        text[:, -1] = module.text.eos_id
        inputs = (image, text)

    def compute(module: Module, image: jax.Array, *rest: Any) -> Any:
        out = module(image, *rest)
        if isinstance(module, CoCa):
            words, scores = module.text(*rest)[0], module.score(module.features(image, *rest))
            return module.image_features(image), words, dict(out), scores
        if isinstance(module, DualEncoder):
            features = module.image(module.pixels.normalize(image))
            return features, module.text(*rest), dict(out)
        return out

    tree = {"params": to_tree(module, model.params)}
    out = jax.jit(lambda tree, *x: module.apply(tree, *x, method=compute))(tree, *inputs)
    return [np.asarray(x, np.float32) for x in jax.tree.leaves(out)]

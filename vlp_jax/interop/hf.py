"""Chooses among the formats of Hugging Face `transformers`, by a config or by a module."""

from __future__ import annotations

from pathlib import Path

from vlp_jax.errors import UserError
from vlp_jax.interop import files, hf_clip, hf_common, hf_siglip, hf_vit, hf_vit_mae
from vlp_jax.interop.base import Extras, Format, Imported
from vlp_jax.interop.trees import Module, Params
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.vit import VisionTransformer

KINDS = (DualEncoder, MaskedAutoencoder, VisionTransformer)
LOADED_BY = 'transformers.{architecture}.from_pretrained("{}")'
HOLDS = ("float32", "bfloat16")

BY_MODEL_TYPE: dict[str, Format] = {
    "clip": hf_clip,
    "siglip": hf_siglip,
    "vit": hf_vit,
    "vit_mae": hf_vit_mae,
}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder by the `model_type` of its config.json.

    Raises:
      UserError: the model type is unknown, or the format cannot read the folder.
    """
    weights = files.find_weights(path, hf_common.WEIGHTS)
    config = weights.parent / "config.json"
    kind = files.load_json(config).get("model_type")
    if kind not in BY_MODEL_TYPE:
        known = ", ".join(BY_MODEL_TYPE)
        raise UserError(f"{config} has model_type {kind!r}, which cannot be read (known: {known})")
    return BY_MODEL_TYPE[kind].read(path, like)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns the reasons why no class can express a module; [] if one of them can."""
    problems = [format_.check(module, extras) for format_ in _formats_of(module)]
    return [line for lines in problems for line in lines] if all(problems) else []


def write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a module as the first class that can express it: CLIPModel before SiglipModel."""
    *formats, last = _formats_of(module)
    able = (format_ for format_ in formats if not format_.check(module, extras))
    # `check` has found a class that is able: if none of the first, then the last.
    return next(able, last).write(module, params, directory, extras)


def _formats_of(module: Module) -> list[Format]:
    """Returns the formats for this class of module, the first choice first."""
    return [format_ for format_ in BY_MODEL_TYPE.values() if isinstance(module, format_.KINDS)]

"""Whichever format of Hugging Face `transformers` fits: by the config on reading, by the module on
writing."""

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
      UserError: it has another one, or the format raises it.
    """
    weights = files.find_weights(path, hf_common.WEIGHTS)
    config = weights.parent / "config.json"
    found = files.load_json(config).get("model_type")
    if found not in BY_MODEL_TYPE:
        known = ", ".join(BY_MODEL_TYPE)
        raise UserError(f"{config} has model_type {found!r}, which cannot be read (known: {known})")
    return BY_MODEL_TYPE[found].read(path, like)


def check(module: Module, extras: Extras) -> list[str]:
    """All that keeps a module from being written: for two towers, what each class lacks."""
    problems = [format_.check(module, extras) for format_ in _formats_of(module)]
    return [line for lines in problems for line in lines] if all(problems) else []


def write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a module as the class that can express it, CLIPModel if both can."""
    *formats, last = _formats_of(module)
    able = (format_ for format_ in formats if not format_.check(module, extras))
    return next(able, last).write(module, params, directory, extras)


def _formats_of(module: Module) -> list[Format]:
    """The formats that hold such a module, the first choice first."""
    return [format_ for format_ in BY_MODEL_TYPE.values() if isinstance(module, format_.KINDS)]

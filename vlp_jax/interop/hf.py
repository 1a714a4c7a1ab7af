"""Chooses among the formats of Hugging Face `transformers`, by a config or by a module."""

from __future__ import annotations

from pathlib import Path

from vlp_jax.errors import UserError
from vlp_jax.interop import files, hf_common, hf_two_towers, hf_vit
from vlp_jax.interop.base import Extras, Format, Imported
from vlp_jax.interop.trees import Module, Params

BY_MODEL_TYPE = {
    "clip": hf_two_towers.CLIP.format,
    "siglip": hf_two_towers.SIGLIP.format,
    "vit": hf_vit.VIT_FORMAT,
    "vit_mae": hf_vit.MAE_FORMAT,
}


def _read(path: Path, like: Module | None = None) -> Imported:
    weights = files.find_weights(path, hf_common.WEIGHTS)
    config = weights.parent / "config.json"
    kind = files.load_json(config).get("model_type")
    if kind not in BY_MODEL_TYPE:
        known = ", ".join(BY_MODEL_TYPE)
        raise UserError(f"{config} has model_type {kind!r}, which cannot be read (known: {known})")
    return BY_MODEL_TYPE[kind].read(path, like)


def _check(module: Module, extras: Extras) -> list[str]:
    problems = [known.check(module, extras) for known in _formats_of(module)]
    return [line for lines in problems for line in lines] if all(problems) else []


def _write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a module as the first class that can express it: CLIPModel before SiglipModel."""
    able = (known for known in _formats_of(module) if not known.check(module, extras))
    return next(able).write(module, params, directory, extras)


def _formats_of(module: Module) -> list[Format]:
    return [known for known in BY_MODEL_TYPE.values() if isinstance(module, known.kinds)]


FORMAT = Format(
    tuple({kind: None for known in BY_MODEL_TYPE.values() for kind in known.kinds}),
    'transformers.{architecture}.from_pretrained("{}")',
    hf_common.HOLDS,
    *(_read, _check, _write),
)

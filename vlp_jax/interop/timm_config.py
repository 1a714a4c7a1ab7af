"""Reads and writes timm's config: names of Vision Transformers, and image preprocessing.

Source: timm 1.0.31, models/vision_transformer.py, models/_pretrained.py (the defaults),
models/_hub.py `_parse_model_cfg`, data/config.py and data/transforms_factory.py
`transforms_imagenet_eval`.

Names such as `vit_base_patch16_siglip_224` follow a rule in the plain, CLIP and SigLIP families.
Other names cannot be parsed. The preprocessing is the section `pretrained_cfg` of config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base
from vlp_jax.interop.base import Extras
from vlp_jax.models.values import IMAGENET, VARIANTS, tower_fields
from vlp_jax.models.vit import VisionTransformer

_WORDS = (
    "tiny",
    "small",
    "medium",
    "base",
    "large",
    "huge",
    "so400m",
    "giant",
    "gigantic",
    "giantopt",
)
_OURS = ("Ti", "S", "M", "B", "L", "H", "So400m", "g", "G", "g-opt")
SIZES = {word: VARIANTS[ours] for word, ours in zip(_WORDS, _OURS, strict=True)}
_NAME = re.compile(
    rf"vit_({'|'.join(SIZES)})_patch(\d+)_(?:(clip|clip_quickgelu|siglip|siglip_gap)_)?(\d+)"
)

# (size, patch size) of the SigLIP family's members -> their image sides.
SIGLIP = {
    ("base", 32): (256,),
    ("base", 16): (224, 256, 384, 512),
    ("large", 16): (256, 384, 512),
    ("so400m", 14): (224, 378, 384),
    ("so400m", 16): (256, 384, 512),
    ("giantopt", 16): (256, 384),
}
SIGLIP_GAP = {**SIGLIP, ("so400m", 14): (224, 378, 384, 448, 896)}


def fields_of(name: str) -> dict[str, Any] | None:
    """Returns the fields of a `VisionTransformer` for a name; None for an unknown name.

    Patches may not tile `image_size`.
    """
    match = _NAME.fullmatch(name.split(".")[0])
    if match is None:
        return None
    word, patch, family, side = match[1], int(match[2]), match[3] or "", int(match[4])
    members = {"siglip": SIGLIP, "siglip_gap": SIGLIP_GAP}.get(family)
    if members is not None and side not in members.get((word, patch), ()):
        return None
    return {
        "image_size": (side, side),
        "patch_size": patch,
        "heads": SIZES[word].heads,
        "activation": _activation(word, patch, family, side),
        "norm_eps": 1e-5 if family.startswith("clip") else 1e-6,
        "pooling": {"siglip": "map", "siglip_gap": "mean"}.get(family, "cls"),
    }


def siglip_name(vit: VisionTransformer) -> str | None:
    """Returns timm's name of an image tower in the SigLIP family; None if it is not a member."""
    family = {"map": "siglip", "mean": "siglip_gap"}.get(vit.pooling)
    ours, sizes = tower_fields(vit), ("width", "depth", "mlp_dim", "heads")
    for (word, patch), sides in (SIGLIP if family == "siglip" else SIGLIP_GAP).items():
        for side in sides:
            name = f"vit_{word}_patch{patch}_{family}_{side}"
            fields = fields_of(name) if family else None
            same = fields and all(ours[field] == x for field, x in fields.items())
            if same and all(getattr(SIZES[word], size) == ours[size] for size in sizes):
                return name
    return None


def _activation(word: str, patch: int, family: str, side: int) -> str:
    if family == "clip_quickgelu":
        return "quick_gelu"
    if family.startswith("siglip"):  # a few members have the tanh approximation, without a rule
        tanh = {("base", 32), ("so400m", 16), ("giantopt", 16)}
        if (word, patch) in tanh or (word, side) == ("large", 512):
            return "gelu_tanh"
    return "gelu"


DEFAULTS = {
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": IMAGENET.mean,
    "std": IMAGENET.std,
}


def section(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Returns the part of a config that describes the input; old configs have no such section."""
    return config.get("pretrained_cfg") or config


def read_images(
    config: Mapping[str, Any], size: tuple[int, int], where: Path, notes: list[str]
) -> dict[str, Any]:
    """Reads the preprocessing of images as fields of `Extras`, for a model that takes `size`."""
    if not config:
        notes.append(f"{where} is not there: nothing says how images are prepared for the model")
        return {}
    values = section(config)
    cfg = {name: values.get(name) or default for name, default in DEFAULTS.items()}
    notes.append(f"images are normalized with mean {list(cfg['mean'])}, std {list(cfg['std'])}")
    mean, std = (base.three_numbers(cfg[name], name, where) for name in ("mean", "std"))
    input_size = tuple((values.get("input_size") or (3, *size))[1:])
    if input_size != size:
        notes.append(
            f"its config prepares images of {input_size[0]} x {input_size[1]} pixels, and the "
            f"model takes {size[0]} x {size[1]}"
        )
    interpolation = cfg["interpolation"]
    if interpolation not in base.RESAMPLINGS:
        notes.append(f"its images are resized by {interpolation!r}, here bicubically")
        interpolation = "bicubic"
    if cfg["crop_mode"] == "border":
        notes.append("its images are fitted in whole and padded, here their middle is cut out")
    pct = cfg["crop_pct"]
    if not isinstance(pct, int | float) or not pct > 0:
        raise UserError(f"{where}: crop_pct is {pct!r}, not a number above 0")
    scale: Any = _scaled(size, pct)
    squash = cfg["crop_mode"] == "squash"
    # For sides that differ, None would mean the shorter side alone (`hf_images.write`).
    if scale == size and (squash or size[0] == size[1]):
        scale = None
    elif not squash and scale[0] == scale[1]:
        scale = scale[0]
    return {
        "image_mean": mean,
        "image_std": std,
        "resize": "squash" if squash else "crop",
        "interpolation": interpolation,
        "scale": scale,
    }


def images_config(size: tuple[int, int], extras: Extras) -> dict[str, Any]:
    """Makes the keys of `pretrained_cfg`, for settings without `problems`."""
    return {
        "interpolation": extras.interpolation,
        "crop_pct": _crop_pct(size, extras.scale),
        "crop_mode": "squash" if extras.resize == "squash" else "center",
        "mean": list(extras.image_mean),
        "std": list(extras.image_std),
    }


def image_problems(size: tuple[int, int], extras: Extras) -> list[str]:
    """Returns a line if the resize cannot be expressed."""
    if _crop_pct(size, extras.scale) is None:
        return [
            f"timm has one crop_pct, with which images for {size[0]} x {size[1]} pixels are not "
            f"scaled to {extras.scale} before they are cut: give --resize"
        ]
    return []


def _scaled(size: Sequence[int], pct: float) -> tuple[int, ...]:
    return tuple(math.floor(side / pct) for side in size)


def _crop_pct(size: tuple[int, int], scale: int | tuple[int, int] | None) -> float | None:
    """Returns a factor with which timm scales to `scale`; None if there is none."""
    if scale is None:
        return 1.0
    wanted = (scale, scale) if isinstance(scale, int) else scale
    if isinstance(scale, int) and size[0] != size[1]:
        return None
    pct = min(side / scaled for side, scaled in zip(size, wanted, strict=True))
    # timm rounds down, so a quotient that is slightly too large would lose a pixel.
    while any(a < b for a, b in zip(_scaled(size, pct), wanted, strict=True)):
        pct = math.nextafter(pct, 0)
    return pct if _scaled(size, pct) == tuple(wanted) else None

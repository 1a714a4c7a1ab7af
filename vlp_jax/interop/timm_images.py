"""Reads and writes timm's image preprocessing, the section `pretrained_cfg` of config.json.

Source: timm 1.0.31, models/_pretrained.py (the defaults), models/_hub.py `_parse_model_cfg`,
data/config.py and data/transforms_factory.py `transforms_imagenet_eval`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base
from vlp_jax.interop.base import Extras
from vlp_jax.models.values import IMAGENET

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


def read(
    config: Mapping[str, Any], size: tuple[int, int], where: Path, notes: list[str]
) -> dict[str, Any]:
    """Reads the preprocessing of images as fields of `Extras`; notes unsupported steps.

    Args:
      size: height and width of the images that the model takes.

    Raises:
      UserError: a value is invalid.
    """
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


def config_of(size: tuple[int, int], extras: Extras) -> dict[str, Any]:
    """Makes the keys of `pretrained_cfg`, for settings without `problems`."""
    return {
        "interpolation": extras.interpolation,
        "crop_pct": _crop_pct(size, extras.scale),
        "crop_mode": "squash" if extras.resize == "squash" else "center",
        "mean": list(extras.image_mean),
        "std": list(extras.image_std),
    }


def problems(size: tuple[int, int], extras: Extras) -> list[str]:
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

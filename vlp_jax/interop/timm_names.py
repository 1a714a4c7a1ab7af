"""Parses the names of timm's Vision Transformers, such as `vit_base_patch16_siglip_224`.

Source: timm 1.0.31, models/vision_transformer.py. The plain, CLIP and SigLIP families are known,
because their names follow a rule. Other names cannot be parsed.
"""

from __future__ import annotations

import re
from typing import Any

from vlp_jax.models.values import VARIANTS, TransformerConfig, tower_fields
from vlp_jax.models.vit import VisionTransformer

SIZES: dict[str, TransformerConfig] = {
    "tiny": VARIANTS["Ti"],
    "small": VARIANTS["S"],
    "medium": VARIANTS["M"],
    "base": VARIANTS["B"],
    "large": VARIANTS["L"],
    "huge": VARIANTS["H"],
    "so400m": VARIANTS["So400m"],
    "giant": VARIANTS["g"],
    "gigantic": VARIANTS["G"],
    "giantopt": VARIANTS["g-opt"],
}
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

"""Sizes of published Transformers, under their usual names.

Sources: Ti, S: Touvron et al. 2021 (DeiT), table 1; B, L, H: Dosovitskiy et al. 2021 (ViT), table
1; g, G: Zhai et al. 2022 (Scaling Vision Transformers), table 2; e: Chen et al. 2023 (PaLI);
So400m: Alabdulmohsin et al. 2023 (Getting ViT in Shape); M, g-opt, G-opt and mu, a test size:
google-research/big_vision, models/vit.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlp_jax.models.values import TransformerConfig

VARIANTS: dict[str, TransformerConfig] = {  # width, depth, mlp_dim, heads
    "mu": TransformerConfig(32, 1, 128, 2),
    "Ti": TransformerConfig(192, 12, 768, 3),
    "S": TransformerConfig(384, 12, 1536, 6),
    "M": TransformerConfig(512, 12, 2048, 8),
    "B": TransformerConfig(768, 12, 3072, 12),
    "L": TransformerConfig(1024, 24, 4096, 16),
    "So400m": TransformerConfig(1152, 27, 4304, 16),
    "H": TransformerConfig(1280, 32, 5120, 16),
    "g": TransformerConfig(1408, 40, 6144, 16),
    "g-opt": TransformerConfig(1536, 40, 6144, 16),
    "G": TransformerConfig(1664, 48, 8192, 16),
    "G-opt": TransformerConfig(1536, 48, 8192, 16),
    "e": TransformerConfig(1792, 56, 15360, 16),
}


SIZES = ("width", "depth", "mlp_dim", "heads")  # what a variant says


def size_of(variant: str | None, **overrides: Any) -> TransformerConfig:
    """The layers of `variant`, with each override that is not None put in its place.

    Without a variant the overrides give all of `SIZES`.

    Raises:
      ValueError: the variant is unknown, a size is missing, or the sizes do not fit each other.
    """
    given = {key: value for key, value in overrides.items() if value is not None}
    if variant is None:
        missing = [size for size in SIZES if size not in given]
        if missing:
            raise ValueError(f"set variant, such as 'B', or else also {', '.join(missing)}")
        return TransformerConfig(**given)
    check_choice("variant", variant, tuple(VARIANTS))
    return dataclasses.replace(VARIANTS[variant], **given)


def split_variant(variant: str | None, patch_size: int | None = None) -> tuple[str | None, int]:
    """("B", 16) of "B/16"; a `patch_size` takes the place of the variant's.

    Raises:
      ValueError: neither says the size of a patch.
    """
    name, slash, patch = (variant or "").partition("/")
    if patch_size is None and patch.isdigit():
        patch_size = int(patch)
    if (slash and not patch.isdigit()) or not patch_size or patch_size < 1:
        raise ValueError(
            "an image variant is SIZE/PATCH, such as 'B/16', unless patch_size is set; got "
            f"variant={variant!r}, patch_size={patch_size!r}"
        )
    return name or None, patch_size


def check_choice(what: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if `name` is not one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(known)})")

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


def size_of(variant: str, **overrides: Any) -> TransformerConfig:
    """Returns the sizes of `variant`, with each override that is not None.

    Raises:
      ValueError: the variant is unknown, or the sizes do not fit each other.
    """
    check_choice("variant", variant, tuple(VARIANTS))
    given = {key: value for key, value in overrides.items() if value is not None}
    return dataclasses.replace(VARIANTS[variant], **given)


def split_variant(variant: str) -> tuple[str, int]:
    """Splits "B/16" into ("B", 16).

    Raises:
      ValueError: there is no patch size after a slash.
    """
    name, slash, patch = variant.partition("/")
    if not slash or not patch.isdigit() or int(patch) < 1:
        raise ValueError(f"an image variant is SIZE/PATCH, such as 'B/16', not {variant!r}")
    return name, int(patch)


def check_choice(what: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if `name` is not one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(known)})")

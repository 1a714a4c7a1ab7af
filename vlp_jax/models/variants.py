"""Sizes of the published Transformers, by the field's names.

Sources: Ti, S: Touvron et al. 2021 (DeiT), table 1; B, L, H: Dosovitskiy et al. 2021 (ViT), table
1; g, G: Zhai et al. 2022 (Scaling Vision Transformers), table 2; e: Chen et al. 2023 (PaLI);
So400m: Alabdulmohsin et al. 2023 (Getting ViT in Shape); M, g-opt, G-opt and mu, a test size:
google-research/big_vision, models/vit.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Size:
    """Width of the residual stream, number of layers, width of the feed-forward layer, heads."""

    width: int
    depth: int
    mlp_dim: int
    heads: int


VARIANTS: dict[str, Size] = {
    "mu": Size(32, 1, 128, 2),
    "Ti": Size(192, 12, 768, 3),
    "S": Size(384, 12, 1536, 6),
    "M": Size(512, 12, 2048, 8),
    "B": Size(768, 12, 3072, 12),
    "L": Size(1024, 24, 4096, 16),
    "So400m": Size(1152, 27, 4304, 16),
    "H": Size(1280, 32, 5120, 16),
    "g": Size(1408, 40, 6144, 16),
    "g-opt": Size(1536, 40, 6144, 16),
    "G": Size(1664, 48, 8192, 16),
    "G-opt": Size(1536, 48, 8192, 16),
    "e": Size(1792, 56, 15360, 16),
}


def size_of(variant: str, **overrides: int | None) -> Size:
    """The size of `variant`, with each override that is not None put in its place.

    Raises:
      ValueError: the variant is unknown, or the heads do not divide the width.
    """
    if variant not in VARIANTS:
        raise ValueError(f"unknown variant {variant!r} (known: {', '.join(VARIANTS)})")
    given = {key: value for key, value in overrides.items() if value is not None}
    size = dataclasses.replace(VARIANTS[variant], **given)
    if size.width % size.heads:
        raise ValueError(f"{size.heads} heads do not divide the width {size.width}")
    return size


def split_variant(variant: str) -> tuple[str, int]:
    """("B", 16) of "B/16".

    Raises:
      ValueError: there is no patch size behind a slash.
    """
    name, slash, patch = variant.partition("/")
    if not slash or not patch.isdigit() or int(patch) < 1:
        raise ValueError(f"an image variant is SIZE/PATCH, such as 'B/16', not {variant!r}")
    return name, int(patch)


def check_choice(what: str, name: str, known: Sequence[str]) -> None:
    """Raises ValueError if `name` is not one of `known`."""
    if name not in known:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(known)})")

"""Position embeddings: fixed sines and cosines, rotary positions, resampling of learned tables."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]  # rows and columns of patches


def sincos_2d(grid: Grid, width: int) -> Float[np.ndarray, "tokens width"]:
    """Makes fixed embeddings of a grid of patches, row by row, float32 (He et al. 2022, "MAE").

    The first half of the width encodes the column, the second half the row. Each half has width / 4
    sines, then as many cosines, of position / 10000 ** (i / (width / 4)). big_vision divides i by
    width / 4 - 1, which gives another table. Raises ValueError if 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that 4 divides, not {width}")
    # float64 until the table is whole, as in facebookresearch/mae: float32 would round the angles.
    frequency = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (columns, rows)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"], base: float, first: Int[Array, ""] | int = 0
) -> Float[Array, "batch tokens heads head_dim"]:
    """Applies rotary positions: the product of a query and a key depends on their distance alone.

    The pair of numbers (i, i + head_dim / 2) of token t is rotated by the angle
    t base^(-2 i / head_dim) (Su et al. 2021, "RoFormer", 3.2.2, with the pairs of Llama). Angles
    and products are float32. `first` is the position of the first token.
    """
    half, odd = divmod(x.shape[-1], 2)
    if odd:
        raise ValueError(f"rotary positions need heads of an even width, not {x.shape[-1]}")
    frequency = jnp.asarray(base ** -(np.arange(half, dtype=np.float64) / half), jnp.float32)
    angle = (first + jnp.arange(x.shape[1]))[:, None, None] * frequency
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def resample(
    table: Float[np.ndarray, "tokens width"], old_grid: Grid, new_grid: Grid, prefix_tokens: int = 0
) -> Float[np.ndarray, "new_tokens width"]:
    """Resamples a table of learned positions to another grid: bicubic, antialiased.

    The first `prefix_tokens` rows (for a class token) stay as they are. Raises ValueError if the
    table does not have a row for each patch of `old_grid`.
    """
    rows = len(table) - prefix_tokens
    if rows != old_grid[0] * old_grid[1] or min(*old_grid, *new_grid) < 1:
        raise ValueError(
            f"a position table of {len(table)} rows cannot be resampled from a grid of "
            f"{old_grid[0]} x {old_grid[1]} patches and {prefix_tokens} other tokens "
            f"({old_grid[0] * old_grid[1] + prefix_tokens} rows) to {new_grid[0]} x {new_grid[1]}"
        )
    if tuple(old_grid) == tuple(new_grid):
        return table
    width = table.shape[-1]
    image = jnp.asarray(table[prefix_tokens:], jnp.float32).reshape(*old_grid, width)
    resized = jax.image.resize(image, (*new_grid, width), "cubic", antialias=True)
    resized = np.asarray(resized).reshape(-1, width).astype(table.dtype)
    return np.concatenate([table[:prefix_tokens], resized])


def square_grid(patches: int) -> Grid:
    """Returns the square grid of `patches` patches; ValueError if that is no square number."""
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(
            f"{patches} positions are no square grid, and nothing tells their rows and columns"
        )
    return side, side

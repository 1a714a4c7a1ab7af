"""Positions of image patches: fixed sines and cosines, and learned tables for another grid."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

Grid = tuple[int, int]  # rows and columns of patches


def sincos_2d(grid: Grid, width: int) -> Float[np.ndarray, "tokens width"]:
    """Fixed embeddings of a grid of patches, row by row, float32 (He et al. 2022, "MAE").

    The first half of the width encodes the column, the second the row; each is width / 4 sines,
    then as many cosines, of position / 10000 ** (i / (width / 4)). google-research/big_vision
    divides by width / 4 - 1 instead; that is another table.

    Raises:
      ValueError: 4 does not divide the width.
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width that 4 divides, not {width}")
    frequency = 10_000.0 ** -(np.arange(width // 4, dtype=np.float64) / (width // 4))
    rows, columns = np.meshgrid(np.arange(grid[0]), np.arange(grid[1]), indexing="ij")
    angles = [place.reshape(-1, 1) * frequency for place in (columns, rows)]
    parts = [function(angle) for angle in angles for function in (np.sin, np.cos)]
    return np.concatenate(parts, axis=1).astype(np.float32)


def rotate(
    x: Float[Array, "batch tokens heads head_dim"],
    base: float,
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "batch tokens heads head_dim"]:
    """Turns the pair (i, i + head_dim / 2) of token t by an angle of t base^(-2 i / head_dim).

    These rotary positions make the product of a query and a key depend on their distance alone (Su
    et al. 2021, "RoFormer", 3.2.2, with the pairs as in Llama). Angles and products are float32.

    Args:
      first: the place of the first token.

    Raises:
      ValueError: heads of an odd width.
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
    table: Float[np.ndarray, "tokens width"],
    old_grid: Grid,
    new_grid: Grid,
    prefix_tokens: int = 0,
) -> Float[np.ndarray, "new_tokens width"]:
    """A table of learned positions for another grid of patches: bicubic, antialiased.

    The first `prefix_tokens` rows (a class token's) stay as they are.

    Raises:
      ValueError: the table does not have a row for each patch of `old_grid`.
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
    """The square grid of so many patches.

    Raises:
      ValueError: the number is no square, so the grid has to come from elsewhere.
    """
    side = round(patches**0.5)
    if side * side != patches:
        raise ValueError(
            f"{patches} positions are no square grid, and nothing says which other they are"
        )
    return side, side

"""Weather: fog and bright light."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.evaluators.corruptions.noise import Image, Number

FIRST_AMPLITUDE = 100.0  # the authors' wibbledecay starts there; the result is normalized


def fog(key: PRNGKeyArray, image: Image, amount: Number, decay: Number) -> Image:
    """Adds a cloud in [0, `amount`], and scales the sum to the largest value of the image."""
    height, width, _ = image.shape
    side = 1 << (max(height, width) - 1).bit_length()
    cloud = amount * plasma(key, side, decay)[:height, :width, None]
    largest = image.max()
    return (image + cloud) * largest / (largest + amount)


def plasma(key: PRNGKeyArray, side: int, decay: Number) -> Float[Array, "side side"]:
    """Draws a cloud in [0, 1] by the diamond-square algorithm on a torus (Fournier et al. 1982).

    Args:
      side: a power of two.
      decay: smoothness. When the grid's step halves, the random part gets `decay ** 2` times
        smaller, as in the authors' program.
    """
    grid, step, amplitude = jnp.zeros((side, side)), side, FIRST_AMPLITUDE
    while step >= 2:
        half = step // 2
        key, *keys = jax.random.split(key, 4)

        def moved(total: Array, key: Array, amplitude: Array = amplitude) -> Array:
            noise = jax.random.uniform(key, total.shape, minval=-1.0)
            return total / 4 + amplitude**2 * noise

        # Squares: the center of four corners. Rolls wrap around, so the cloud tiles.
        corners = grid[::step, ::step]
        square = corners + jnp.roll(corners, -1, 0)
        centers = moved(square + jnp.roll(square, -1, 1), keys[0])
        grid = grid.at[half::step, half::step].set(centers)
        # Diamonds: the middle of each edge, from two corners and two centers.
        above = centers + jnp.roll(centers, 1, 0) + corners + jnp.roll(corners, -1, 1)
        grid = grid.at[::step, half::step].set(moved(above, keys[1]))
        beside = centers + jnp.roll(centers, 1, 1) + corners + jnp.roll(corners, -1, 0)
        grid = grid.at[half::step, ::step].set(moved(beside, keys[2]))
        step, amplitude = half, amplitude / decay
    grid = grid - grid.min()
    return grid / grid.max()


def brightness(key: PRNGKeyArray, image: Image, more: Number) -> Image:
    """Raises the value V of HSV by `more`; hue and saturation stay. Black becomes grey."""
    del key
    value = image.max(axis=-1, keepdims=True)
    brighter = jnp.minimum(value + more, 1)
    return jnp.where(value > 0, image * (brighter / jnp.maximum(value, 1e-6)), brighter)

"""Noise: of a sensor, of few photons, of dead pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

Image = Float[Array, "height width 3"]  # values in [0, 1]
Number = Float[Array, ""]


def gaussian_noise(key: PRNGKeyArray, image: Image, stddev: Number) -> Image:
    """Adds normal noise to every value."""
    return image + stddev * jax.random.normal(key, image.shape)


def shot_noise(key: PRNGKeyArray, image: Image, photons: Number) -> Image:
    """Draws Poisson counts of photons; white has `photons` on average."""
    return jax.random.poisson(key, image * photons) / photons


def impulse_noise(key: PRNGKeyArray, image: Image, amount: Number) -> Image:
    """Sets the share `amount` of the values to 0 or 1 (salt and pepper), each channel by itself."""
    chosen, salt = jax.random.uniform(key, (2, *image.shape))
    return jnp.where(chosen < amount, (salt < 0.5).astype(image.dtype), image)

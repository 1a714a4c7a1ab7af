"""Blur: out of focus, by a moving camera, by a zoom."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.evaluators.corruptions.noise import Image

MAX_DEGREES = 45.0  # largest angle between the camera's movement and the horizontal


def defocus_blur(key: PRNGKeyArray, image: Image, kernel: Float[Array, "side side"]) -> Image:
    """Correlates each channel with a kernel. The edge is mirrored (OpenCV's BORDER_REFLECT_101)."""
    del key
    margin = kernel.shape[0] // 2
    padded = jnp.pad(image, ((margin, margin), (margin, margin), (0, 0)), mode="reflect")
    return jax.lax.conv_general_dilated(
        padded.transpose(2, 0, 1)[:, None], kernel[None, None], (1, 1), "VALID"
    )[:, 0].transpose(1, 2, 0)


def motion_blur(key: PRNGKeyArray, image: Image, weights: Float[Array, " taps"]) -> Image:
    """Averages each pixel with the next pixels along a random direction.

    The pixels are chosen by ImageMagick's rule (MagickCore/effect.c, MotionBlurImage). Beyond the
    edge, the last pixel is repeated.
    """
    height, width, _ = image.shape
    angle = jnp.radians(jax.random.uniform(key, minval=-MAX_DEGREES, maxval=MAX_DEGREES))
    down, right = jnp.sin(angle), jnp.cos(angle)

    def add(total: Array, tap: tuple[Array, Array]) -> tuple[Array, None]:
        place, weight = tap
        rows = jnp.arange(height) + jnp.ceil(place * down - 0.5).astype(jnp.int32)
        columns = jnp.arange(width) + jnp.ceil(place * right - 0.5).astype(jnp.int32)
        moved = image[jnp.clip(rows, 0, height - 1)][:, jnp.clip(columns, 0, width - 1)]
        return total + weight * moved, None

    places = jnp.arange(len(weights), dtype=jnp.float32)
    return jax.lax.scan(add, jnp.zeros_like(image), (places, weights))[0]


def zoom_blur(
    key: PRNGKeyArray,
    image: Image,
    rows: Float[Array, "zooms height height"],
    columns: Float[Array, "zooms width width"],
    weights: Float[Array, " zooms"],
) -> Image:
    """Computes the weighted sum of the image enlarged about its middle, by factors from 1 on."""
    del key
    return jnp.einsum("z,zih,hwc,zjw->ijc", weights, rows, image, columns)

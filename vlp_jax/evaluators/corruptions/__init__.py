"""Common corruptions of images at five severities (Hendrycks and Dietterich 2019, "ImageNet-C").

These are eleven of their fifteen. The others are glass blur and elastic transform, which move
pixels at random, and snow and frost, which need ImageMagick's filters and photographs of ice.

Constants come from the authors' programs (hendrycks/robustness, ImageNet-C/create_c): from
make_tinyimagenet_c.py, for 64 pixels, if the shorter side of an image is below `SMALL_SIDE`, else
from make_imagenet_c.py, for 224 pixels. Unlike their images, the results are not saved as JPEG.
Other differences are noted at the functions.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt8

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators.corruptions import constants
from vlp_jax.evaluators.corruptions.blur import defocus_blur, motion_blur, zoom_blur
from vlp_jax.evaluators.corruptions.digital import contrast, jpeg_compression, pixelate
from vlp_jax.evaluators.corruptions.noise import gaussian_noise, impulse_noise, shot_noise
from vlp_jax.evaluators.corruptions.weather import brightness, fog

SEVERITIES = (1, 2, 3, 4, 5)
SMALL_SIDE = 128

# (key, image float32 [h, w, 3] in [0, 1], *constants) -> image; it may leave [0, 1].
Corruption = Callable[..., Array]
CORRUPTIONS: dict[str, Corruption] = {
    "gaussian_noise": gaussian_noise,
    "shot_noise": shot_noise,
    "impulse_noise": impulse_noise,
    "defocus_blur": defocus_blur,
    "motion_blur": motion_blur,
    "zoom_blur": zoom_blur,
    "fog": fog,
    "brightness": brightness,
    "contrast": contrast,
    "pixelate": pixelate,
    "jpeg_compression": jpeg_compression,
}


def corrupt(
    images: UInt8[Array, "batch height width 3"],
    numbers: Int[Array, " batch"],
    name: str,
    severity: int,
    seed: int = 0,
) -> UInt8[Array, "batch height width 3"]:
    """Corrupts images; returns them rounded, with the sharding of `images`.

    Args:
      numbers: the number of each image in its split. The randomness of an image depends on its
        number, the seed, the name and the severity, and not on the batch.
      name: a key of `CORRUPTIONS`.
      severity: one of `SEVERITIES`.

    Raises:
      UserError: unknown name or severity.
    """
    check([name], [severity])
    height, width = images.shape[1:3]
    values = constants.of(name, severity, height, width, small=min(height, width) < SMALL_SIDE)
    tag = zlib.crc32(f"{name}:{severity}".encode())
    key = jax.random.fold_in(jax.random.key(seed), tag)
    return _corrupt(name, images, numbers, key, values)


@functools.partial(jax.jit, static_argnums=0)
def _corrupt(name: str, images: Array, numbers: Array, key: Array, values: Any) -> Array:
    # The constants are arguments, so that one compiled program serves all severities.
    def one(image: Array, number: Array) -> Array:
        image_key = jax.random.fold_in(key, number)
        pixels = CORRUPTIONS[name](image_key, image.astype(jnp.float32) / 255, *values)
        return jnp.round(jnp.clip(pixels, 0, 1) * 255).astype(jnp.uint8)

    return jax.vmap(one)(images, numbers)


def check(names: Sequence[str], severities: Sequence[int]) -> None:
    """Raises UserError for an unknown corruption or severity."""
    for name in names:
        if name not in CORRUPTIONS:
            raise UserError(unknown_key_message(str(name), CORRUPTIONS, "the corruptions"))
    for severity in severities:
        if severity not in SEVERITIES or isinstance(severity, bool | np.bool_):
            raise UserError(f"severities of corruptions are 1 to 5, got {severity!r}")

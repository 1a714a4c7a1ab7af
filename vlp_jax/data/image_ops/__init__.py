"""Image operations on an example's `image`, inside a tf.data graph.

Images are uint8 RGB, [height, width, 3]. Each public function checks its settings and returns the
operation, a function (example, seed) -> example; `vlp_jax.data.ops` lists them for configs, and
docs/data_images.md describes them.
"""

from vlp_jax.data.image_ops.augment import (
    color_jitter,
    gaussian_blur,
    grayscale,
    random_erasing,
    solarize,
)
from vlp_jax.data.image_ops.crop import (
    fuse,
    random_resized_crop,
    resize,
    resize_shortest_and_center_crop,
    resize_shortest_and_random_crop,
)
from vlp_jax.data.image_ops.decode import decode_image
from vlp_jax.data.image_ops.geometry import (
    flip_left_right,
    random_rotation,
    random_translation,
)
from vlp_jax.data.image_ops.rand_augment import rand_augment

__all__ = [
    "color_jitter",
    "decode_image",
    "flip_left_right",
    "fuse",
    "gaussian_blur",
    "grayscale",
    "rand_augment",
    "random_erasing",
    "random_resized_crop",
    "random_rotation",
    "random_translation",
    "resize",
    "resize_shortest_and_center_crop",
    "resize_shortest_and_random_crop",
    "solarize",
]

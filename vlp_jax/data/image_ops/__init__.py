"""Image operations on an example's `image`, inside a tf.data graph.

Images are uint8 RGB, [height, width, 3]. Each public function checks its settings and returns the
operation, a function (example, seed) -> example; `vlp_jax.data.ops` lists them for configs, and
docs/data_images.md describes them.
"""

from vlp_jax.data.image_ops.crop import (
    fuse,
    random_resized_crop,
    resize,
    resize_shortest_and_center_crop,
    resize_shortest_and_random_crop,
)
from vlp_jax.data.image_ops.decode import decode_image
from vlp_jax.data.image_ops.geometry import flip_left_right
from vlp_jax.data.image_ops.headers import exif_orientation

__all__ = [
    "decode_image",
    "exif_orientation",
    "flip_left_right",
    "fuse",
    "random_resized_crop",
    "resize",
    "resize_shortest_and_center_crop",
    "resize_shortest_and_random_crop",
]

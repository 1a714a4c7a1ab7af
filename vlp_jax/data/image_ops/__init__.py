"""Image operations on an example's `image`, inside a tf.data graph.

Images are uint8 RGB, [height, width, 3]. Each public function checks its settings and returns the
operation, a function (example, seed) -> example; `vlp_jax.data.ops` lists them for configs, and
docs/data_images.md describes them.
"""

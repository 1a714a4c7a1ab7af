"""The embedded dataset `shapes`: rendered scenes with captions, boxes and questions.

Importing this package or any of its modules but `builder` needs numpy, Pillow and jaxtyping alone,
so that the processes that render do not load TensorFlow. `vlp_jax.data.shapes.builder` holds the
tensorflow_datasets builder and `prepare`, which writes the dataset to disk.
"""

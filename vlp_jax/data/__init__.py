"""Sources, order, preprocessing, tokenizers and the input pipeline. No jax in here.

TensorFlow is imported lazily, so that training on in-memory arrays works where it is not installed.
"""

"""Experiments, one a file. Each starts from `vlp_jax.config.base()` or from another."""

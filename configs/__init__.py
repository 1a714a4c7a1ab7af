"""Experiments, one a file. Each derives from `vlp_jax.config.base()` or from another experiment."""

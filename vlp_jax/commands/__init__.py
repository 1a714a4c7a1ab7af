"""Commands of `vlp-jax` that have no module of their own beside `train`, one module a command."""

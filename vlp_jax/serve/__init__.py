"""A local page to try a model: python -m vlp_jax.serve --workdir DIR."""

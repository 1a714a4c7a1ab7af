"""Programs that import nothing of vlp_jax and are run or copied as files."""

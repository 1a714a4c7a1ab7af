"""Programs that do not import vlp_jax. They are run or copied as files."""

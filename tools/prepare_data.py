"""Runs `vlp-jax prepare-data` from a checkout: python -m tools.prepare_data."""

from vlp_jax.commands.prepare_data import main

if __name__ == "__main__":
    raise SystemExit(main())

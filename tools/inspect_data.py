"""Runs `vlp-jax inspect-data` from a checkout: python -m tools.inspect_data."""

from vlp_jax.commands.inspect_data import main

if __name__ == "__main__":
    raise SystemExit(main())

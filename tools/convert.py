"""Runs `vlp-jax convert` from a checkout: python -m tools.convert."""

from vlp_jax.commands.convert import main

if __name__ == "__main__":
    raise SystemExit(main())

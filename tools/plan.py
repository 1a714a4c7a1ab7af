"""Runs `vlp-jax plan` from a checkout: python -m tools.plan."""

from vlp_jax.commands.plan import main

if __name__ == "__main__":
    raise SystemExit(main())

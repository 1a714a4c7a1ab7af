"""Runs `vlp-jax look-inside` from a checkout: python -m tools.look_inside."""

from vlp_jax.commands.look_inside import main

if __name__ == "__main__":
    raise SystemExit(main())

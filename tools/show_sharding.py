"""Runs `vlp-jax show-sharding` from a checkout: python -m tools.show_sharding."""

from vlp_jax.commands.show_sharding import main

if __name__ == "__main__":
    raise SystemExit(main())

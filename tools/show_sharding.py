"""Runs `vlp-jax show-sharding` from a checkout: python -m tools.show_sharding."""

import sys

from vlp_jax.commands.show_sharding import main

if __name__ == "__main__":
    sys.exit(main())

"""Runs `vlp-jax convert` from a checkout: python -m tools.convert."""

import sys

from vlp_jax.commands.convert import main

if __name__ == "__main__":
    sys.exit(main())

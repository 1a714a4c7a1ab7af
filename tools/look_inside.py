"""Runs `vlp-jax look-inside` from a checkout: python -m tools.look_inside."""

import sys

from vlp_jax.commands.look_inside import main

if __name__ == "__main__":
    sys.exit(main())

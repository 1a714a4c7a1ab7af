"""Runs `vlp-jax plan` from a checkout: python -m tools.plan."""

import sys

from vlp_jax.commands.plan import main

if __name__ == "__main__":
    sys.exit(main())

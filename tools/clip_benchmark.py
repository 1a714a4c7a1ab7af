"""Runs `vlp-jax clip-benchmark` from a checkout: python -m tools.clip_benchmark."""

import sys

from vlp_jax.commands.clip_benchmark import main

if __name__ == "__main__":
    sys.exit(main())

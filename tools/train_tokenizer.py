"""Runs `vlp-jax train-tokenizer` from a checkout: python -m tools.train_tokenizer."""

import sys

from vlp_jax.commands.train_tokenizer import main

if __name__ == "__main__":
    sys.exit(main())

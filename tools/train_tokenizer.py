"""Runs `vlp-jax train-tokenizer` from a checkout: python -m tools.train_tokenizer."""

from vlp_jax.commands.train_tokenizer import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Runs `vlp-jax write-evaluation-tars` from a checkout: python -m tools.write_evaluation_tars."""

from vlp_jax.commands.write_evaluation_tars import main

if __name__ == "__main__":
    raise SystemExit(main())

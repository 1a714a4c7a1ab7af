"""Runs `vlp-jax compare-scores` from a checkout: python -m tools.compare_scores."""

from vlp_jax.commands.compare_scores import main

if __name__ == "__main__":
    raise SystemExit(main())

"""Runs `vlp-jax clip-benchmark` from a checkout: python -m tools.clip_benchmark."""

from vlp_jax.commands.clip_benchmark import main

if __name__ == "__main__":
    raise SystemExit(main())

"""A small SigLIP for `make bench`: a step of half a second on two CPU cores. Nothing is trained.

    python -m tools.perf.step --config configs/bench_small.py --peer plain --peer open_clip

Images of 64 pixels in patches of 16, texts of 32 tokens, width 192: small enough for a CPU, large
enough that a step is matrix products and not its own overhead.
"""

from configs import siglip_shapes
from vlp_jax.config import duration


def get_config(arg=None):
    config = siglip_shapes.get_config(arg)
    config.batch_size = 128
    config.duration = duration(steps=1_000)
    config.objective.image.variant = "Ti/16"  # with the width, depth and heads of the base
    config.objective.text.depth = 4
    config.objective.remat = "dots"  # XLA fuses the backward pass badly on CPU otherwise
    config.tokenizer.vocab_size = 8192
    return config

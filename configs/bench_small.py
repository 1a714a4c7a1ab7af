"""A small SigLIP for `make bench`, with steps of half a second on two CPU cores.

    python -m tools.perf.step --config configs/bench_small.py --peer plain --peer open_clip

Images have 64 pixels in patches of 16, texts 32 tokens, and the width is 192. This is small enough
for a CPU, and large enough that matrix products dominate a step, and not its overhead.
"""

from configs import siglip_shapes
from vlp_jax.config import duration


def get_config(arg=None):
    config = siglip_shapes.get_config(arg)
    config.batch_size = 128
    config.duration = duration(steps=1_000)
    config.objective.image.variant = "Ti/16"  # only the patch size: `clip_shapes` sets the rest
    config.objective.text.depth = 4
    config.objective.remat = "dots"  # XLA fuses the backward pass badly on CPU otherwise
    config.tokenizer.vocab_size = 8192
    return config

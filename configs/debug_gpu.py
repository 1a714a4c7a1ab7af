"""`configs/clip_b16.py` at full size, on one GPU and the embedded `shapes`: minutes, no download.

    python -m vlp_jax.train --config configs/debug_gpu.py --workdir DIR

Use it to see that a machine trains at the right speed before a real run is launched: the progress
line shows examples per second and MFU. Model, blocked loss and bfloat16 are the recipe's; batch,
schedule, vocabulary and data are smaller. Pictures of 64 pixels are enlarged.
"""

from ml_collections import ConfigDict

from configs import clip_b16, clip_shapes
from vlp_jax.config import duration


def get_config(arg=None):
    config = clip_b16.get_config(arg)
    config.batch_size = 256
    config.duration = duration(steps=1_000)
    config.objective.dtype = "bfloat16"
    config.tokenizer = ConfigDict({"name": "subword", "vocab_size": 512, "context_length": 32})
    small = clip_shapes.get_config()
    config.data, config.evaluators = small.data, small.evaluators
    for name in ("retrieval_captions", "geometry", *clip_shapes.PROBES):
        del config.evaluators[name]
    config.data.preprocess = {
        "choose_text": {},
        "decode_image": {},
        "resize": {},
        "keep": {"fields": ("image", "text")},
    }
    config.optimizer.warmup = duration(percent=10.0)
    config.log.every = duration(steps=10)
    config.checkpoint.every = duration(percent=50.0)
    return config

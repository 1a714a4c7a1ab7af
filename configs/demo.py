"""CLIP on the embedded `shapes` in minutes on two CPU cores: the config of `make demo`."""

from configs import clip_shapes
from vlp_jax.config import duration

TOWER = {"width": 128, "mlp_dim": 512, "heads": 4}
# Color is learned within a hundred steps, shape much later. A larger factor on the cosine
# similarity seemed to help (few runs, other settings changed with it).
LOGIT_SCALE_INIT = 60.0


def get_config(arg=None):
    config = clip_shapes.get_config(arg)
    config.batch_size = 128
    config.duration = duration(epochs=8.5)
    config.optimizer.learning_rate = 8e-4
    config.objective.embed_dim = 128
    config.objective.image.update(variant="Ti/16", depth=4, **TOWER)
    config.objective.text.update(depth=1, causal=False, pooling="mean", **TOWER)
    config.objective.logit_scale_init = LOGIT_SCALE_INIT
    config.objective.remat = "dots"  # XLA fuses the backward pass badly on CPU otherwise
    config.data.preprocess = {
        "choose_text": {},
        "decode_image": {},
        "resize": {"size": 64},
        "keep": {"fields": ("image", "text")},
    }
    config.checkpoint.every = duration(percent=25.0)
    return config

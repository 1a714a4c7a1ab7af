"""Two stages on the embedded `shapes`, on two CPU cores: a masked autoencoder, then CLIP from it.

    python -m vlp_jax.train --config configs/mae_then_clip.py:mae --workdir runs/mae
    python -m vlp_jax.train --config configs/mae_then_clip.py:clip --workdir runs/clip \
        --config.init_from.source=runs/mae

Without `init_from` the second stage starts from nothing. `python -m tools.mae_then_clip` runs both
stages and that one, and draws what comes out.
"""

from ml_collections import ConfigDict

from configs import clip_shapes, demo
from vlp_jax.config import duration

IMAGE = {
    "variant": "Ti/8",
    "image_size": 64,
    "class_token": True,
    "position": "sincos",
    "activation": "gelu",
    "depth": 4,
    **demo.TOWER,
}
DECODER = {"width": 128, "depth": 2, "mlp_dim": 512, "heads": 4}


def get_config(arg=None):
    config = demo.get_config()
    if arg in (None, "clip"):
        return clip(config)
    if arg != "mae":
        raise ValueError(f"configs/mae_then_clip.py takes 'mae' or 'clip', not {arg!r}")
    return mae(config)


def mae(config):
    config.duration = duration(steps=1500)
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.muon.learning_rate = 0.02
    config.objective = ConfigDict(
        {
            "name": "masked_autoencoding",
            "image": {**IMAGE},
            "decoder": DECODER,
            "mask_ratio": 0.75,
            # Pixels as they are: the picture then owes nothing to the patches that are hidden.
            "normalize_targets": False,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "remat": "dots",
        }
    )
    config.tokenizer = ConfigDict()
    config.data.preprocess = {
        "decode_image": {},
        "resize": {"size": 64},
        "keep": {"fields": ("image",)},
    }
    config.evaluators = ConfigDict(
        {
            "reconstruction": {
                "name": "reconstruction",
                "data": clip_shapes.test_data(limit=1000),
                "every": duration(percent=10.0),
            }
        }
    )
    config.evaluators.reconstruction.data.preprocess = config.data.preprocess
    return config


def clip(config):
    config.objective.image = ConfigDict({**IMAGE, "pooling": "mean"})
    # Of the source, the encoder alone; what is not of the image tower starts from the seed.
    config.init_from.rules = (("image/.*", "load"), (".*", "fresh"))
    for evaluator in config.evaluators.values():
        evaluator.every = duration(steps=25)
    return config

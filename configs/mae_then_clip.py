"""Two stages on the embedded `shapes`, on two CPU cores: a masked autoencoder, then CLIP from it.

    python -m vlp_jax.train --config configs/mae_then_clip.py:mae --workdir runs/mae
    python -m vlp_jax.train --config configs/mae_then_clip.py:clip --workdir runs/clip \
        --config.init_from.source=runs/mae

The second stage is the demo with towers that average their tokens, in 400 steps, evaluated more
often. Without `init_from` it starts from random weights. `python -m tools.results --only
mae_then_clip` runs both stages and the comparison from random weights.
"""

from ml_collections import ConfigDict

from configs import clip_shapes, demo
from vlp_jax.config import duration

DECODER = {"depth": 4, **demo.TOWER}
# Fields in which masked autoencoders usually differ from CLIP; here the stages share the tower.
SHARED = {"class_token": False, "position": "learned", "activation": "gelu_tanh"}


def get_config(arg=None):
    config = demo.get_config()
    config.duration = duration(steps=400)
    config.objective.image.update(clip_shapes.MEAN_POOLING)
    config.objective.text.update({"causal": False, "pooling": "mean", "norm_eps": 1e-6})
    if arg in (None, "clip"):
        return clip(config)
    if arg != "mae":
        raise ValueError(f"configs/mae_then_clip.py takes 'mae' or 'clip', not {arg!r}")
    return mae(config)


def mae(config):
    config.duration = duration(steps=1500)
    config.optimizer.learning_rate = 1.5e-3
    config.optimizer.muon.learning_rate = 0.02
    # With less decay, kernels grow so large under Muon that the short second stage hardly moves
    # them.
    config.optimizer.weight_decay = 0.3
    image = {**config.objective.image.to_dict(), **SHARED}
    del image["pooling"]
    config.objective = ConfigDict(
        {
            "name": "masked_autoencoding",
            "image": image,
            "decoder": DECODER,
            # An image has only 16 patches: a ratio of 0.75 would leave 4, too few to see objects.
            "mask_ratio": 0.5,
            # So that a picture of the reconstruction needs no statistics of the hidden patches.
            "normalize_targets": False,
            "image_mean": (0.5, 0.5, 0.5),
            "image_std": (0.5, 0.5, 0.5),
            "remat": "dots",
        }
    )
    config.tokenizer = ConfigDict()
    config.data.preprocess = {
        "decode_image": {},
        "resize": {},
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
    # Load only the encoder; all parameters outside of the image tower are initialized.
    config.init_from.rules = (("image/.*", "load"), (".*", "fresh"))
    config.evaluators.zero_shot.every = duration(steps=25)
    return config

"""CapPa ViT-B/16 at 224 pixels (Tschannen et al. 2023, "Image Captioners Are Scalable Vision
Learners Too", arXiv:2306.07915).

Aims at: table 2 there, CapPa B/16 on 9 billion examples.

    python -m vlp_jax.train --config configs/cappa_b16.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

From google-research/big_vision, configs/proj/cappa/pretrain.py: a decoder of half the encoder's
depth without biases, parallel prediction of three quarters of the examples, 64 tokens, a vocabulary
of 32,000, batch, steps, optimizer and warm-up.

Differences: LAION-400M replaces the private WebLI. Evaluation uses a part of ImageNet, because each
image is scored with each of 1,000 names.
"""

from ml_collections import ConfigDict

from configs import _recipes
from vlp_jax.config import duration

RESIZE = {"resize": {"size": 224, "method": "bilinear", "antialias": False}}


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = _recipes.image_text(augmentation=RESIZE, resize=RESIZE)
    config.batch_size = 8_192
    config.duration = duration(steps=366_500)
    layers = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    config.objective = ConfigDict(
        {
            "name": "captioning",
            "parallel_share": 0.75,
            "image": {"variant": "B/16", **layers},
            "decoder": {"variant": "B", "depth": 6, **layers},
            **_recipes.HALF_PIXELS,
            "remat": "dots",
        }
    )
    config.tokenizer = _recipes.subwords(vocab_size=32_000, context_length=64)
    config.optimizer.warmup = duration(steps=10_000)
    of_imagenet, pairs = config.evaluators.zero_shot, config.evaluators.retrieval
    config.evaluators = ConfigDict(
        {
            "likelihood": {
                "name": "likelihood",
                "class_names": of_imagenet.class_names,
                "data": {**of_imagenet.data.to_dict(), "limit": 2_000},
                "every": of_imagenet.every,
            },
            "captions": {
                "name": "captions",
                "references": "text_raw",
                # A part, because captions are generated token by token.
                "data": {**pairs.data.to_dict(), "limit": 2_000},
                "every": pairs.every,
            },
            "loss": {"name": "loss", "data": pairs.data, "every": pairs.every},
        }
    )
    return _recipes.big_vision_adafactor(config, b2=0.999)

"""FLIP ViT-L/16: CLIP trained on half of the patches (Li et al. 2023, arXiv:2212.00794).

Aims at: Li et al. 2023, table 2, and facebookresearch/flip, README.md: ViT-L/16 with a mask ratio
of 50%, LAION-400M, 12.8 billion samples, zero-shot ImageNet 74.3, after both stages.

    python -m vlp_jax.train --config configs/flip_l16.py --workdir runs/flip_l16 \
        --config.tokenizer.file=TOKENIZER_JSON
    python -m vlp_jax.train --config configs/flip_l16.py:tune --workdir runs/flip_l16_tuned \
        --config.tokenizer.file=TOKENIZER_JSON --config.init_from.source=runs/flip_l16

The second stage trains on all patches for a hundredth of the time (section 3, "unmasking"). If the
first stage has trained its own tokenizer, TOKENIZER_JSON is runs/flip_l16/tokenizer.json. The
published tokenizer is the tokenizer.json of google-bert/bert-base-uncased. All numbers come from
facebookresearch/flip: configs/default.py, configs/cfg_flip_large.py, and "Unmasked tuning" in its
README.

Differences: the mean over the image's tokens excludes the class token. [CLS] and [SEP] at the ends
of a text are two of its 32 tokens; texts are pooled at the first token as in FLIP. The table of
tokens has 30,522 rows instead of 30,523.
"""

from ml_collections import ConfigDict

from configs import _recipes
from vlp_jax.config import duration


def virtual_epochs(count):
    """Makes a duration in epochs of ImageNet, on any data, as FLIP's configs count them."""
    return duration(examples=count * _recipes.IMAGENET_EXAMPLES)


def get_config(arg=None):
    stage = _recipes.known_argument(arg, ("mask", "tune"))
    bicubic = {"method": "bicubic", "antialias": False}
    config = _recipes.image_text(
        augmentation={
            "random_resized_crop": {**bicubic, "min_scale": 0.5},
            "flip_left_right": {"unless_text": None},
        },
        resize={"resize_shortest_and_center_crop": bicubic},
    )
    _recipes.shard_parameters(config)
    config.batch_size = 65_536
    config.duration = virtual_epochs(10_000)
    tower = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "loss_form": "blocked",
            "mask_ratio": 0.5,
            "logit_scale_init": 1 / 0.07,
            "max_logit_scale": 100.0,
            "embed_dim": 768,
            "image": {
                "variant": "L/16",
                "pooling": "mean",
                "class_token": True,
                "position": "sincos",
                **tower,
            },
            "text": {"variant": "B", "causal": False, "pooling": "first", **tower},
            **_recipes.IMAGENET_PIXELS,
            "remat": "dots",
        }
    )
    config.tokenizer = _recipes.subwords(vocab_size=30_522, context_length=32)
    # FLIP's configs give the rate of 256 examples, and scale it with the batch.
    config.optimizer.learning_rate = 4e-6 * config.batch_size / 256
    config.optimizer.warmup = virtual_epochs(40)
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95
    config.optimizer.weight_decay = 0.2
    # In FLIP, everything but biases, norms and positions decays, also the logit scale
    # (utils/opt_util.py).
    config.optimizer.no_decay = ("bias", "scale", "position_embedding")
    config.optimizer.clip_norm = 0.0
    return tuned(config) if stage == "tune" else config


def tuned(config):
    """Changes the config to the second stage, which trains on all patches."""
    config.objective.mask_ratio = 0.0
    # Twice as many patches as in the first stage take twice the memory.
    config.objective.remat = "full"
    config.duration = virtual_epochs(100)
    config.optimizer.learning_rate = 4e-8 * config.batch_size / 256
    config.optimizer.warmup = virtual_epochs(20)
    config.init_from.source = "runs/flip_l16"
    config.checkpoint.every = duration(percent=10.0)
    return config

"""The parts that the published recipes share: data, evaluators, tokenizer, optimizers.

The files beside this one say what is a model's own. Where a constant is from is said where it
stands. What holds for all of them:

- Private datasets are replaced by LAION-400M as `tensorflow_datasets` prepares it
  (`laion400m/images`); ImageNet is its `imagenet2012`. Another one is taken by
  `--config.data.source`, `--config.data.dataset` and the other keys of `config.data`.
- Without `--config.tokenizer.file` a byte-level BPE is trained on the captions, with as many tokens
  as the published vocabulary. Its ids differ from the ids of the published weights.
- Without ImageNet: `--config.evaluators.zero_shot=None`.
- Zero-shot ImageNet is scored with 7 prompts a class and not the 80 of Radford et al. 2021.
"""

from pathlib import Path

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from vlp_jax.config import base, duration
from vlp_jax.errors import UserError

# openai/CLIP, clip/clip.py, `_transform`
CLIP_PIXELS = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
IMAGENET_PIXELS = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
# [0, 255] to [-1, 1]: `value_range(-1, 1)` in the configs of google-research/big_vision
HALF_PIXELS = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}

# The subset of the 80 prompts that does as well as all of them in openai/CLIP,
# notebooks/Prompt_Engineering_for_ImageNet.ipynb.
TEMPLATES = (
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
# Texts come in lower case, as in the training data.
CLASS_NAMES = tuple(
    line.lower()
    for line in Path(__file__).with_name("imagenet_class_names.txt").read_text().splitlines()
    if not line.startswith("#")
)

IMAGENET_EXAMPLES = 1_281_167
HELD_OUT = 10_000  # pairs at the start of the training data that retrieval is measured on


def known_argument(arg, known=()):
    """`arg`, or the first of `known` if it is None; a UserError if it is none of them."""
    if arg is None:
        return known[0] if known else None
    if arg not in known:
        listed = ", ".join(known) or "none"
        raise UserError(f"this config has no argument {arg!r} (known: {listed})")
    return arg


def long_run(config):
    """Gives a config what suits a run of days: few lines, many checkpoints, some scores."""
    config.log.every = duration(steps=100)
    config.checkpoint.every = duration(steps=5_000)
    config.checkpoint.keep_last = 3
    return config


def shard_parameters(config):
    """Parameters and optimizer state spread over all devices, for models of more than a base size.

    On several slices or hosts with a slow network between them, `--config.mesh.preset=hybrid`
    spreads them over the devices of each.
    """
    config.mesh.preset = "fsdp"
    return config


def image_text(augmentation, resize):
    """A config with data and evaluators of image-text pretraining at 224 pixels, and no model.

    Args:
      augmentation: operations on a training image after it is decoded.
      resize: operations on an image that is evaluated.
    """
    config = long_run(base())
    config.image_size = 224
    text = {"choose_text": {"field": "caption"}, "lowercase": {}}
    kept = {"keep": {"fields": ("image", "text")}}
    config.data = ConfigDict(
        {
            "source": "tfds",
            "dataset": "laion400m/images",
            "split": f"train[{HELD_OUT}:]",
            "data_dir": placeholder(str),
            "preprocess": {**text, "decode_image": {}, **augmentation, **kept},
        }
    )
    config.evaluators = ConfigDict(
        {
            "zero_shot": {
                "name": "zero_shot",
                "templates": TEMPLATES,
                "class_names": CLASS_NAMES,
                "data": {
                    "dataset": "imagenet2012",
                    "split": "validation",
                    "preprocess": {"decode_image": {}, **resize},
                },
                "every": duration(percent=5.0),
            },
            "retrieval": {
                "name": "retrieval",
                "data": {
                    "split": f"train[:{HELD_OUT}]",
                    "preprocess": {**text, "decode_image": {}, **resize, **kept},
                },
                "every": duration(percent=5.0),
            },
        }
    )
    return config


def imagenet(augmentation, resize):
    """A config with data and evaluators of pretraining on ImageNet at 224 pixels, and no model.

    Takes the arguments of `image_text`.
    """
    config = long_run(base())
    config.image_size = 224
    kept = {"keep": {"fields": ("image",)}}
    config.data = ConfigDict(
        {
            "source": "tfds",
            "dataset": "imagenet2012",
            "split": "train",
            "data_dir": placeholder(str),
            "preprocess": {"decode_image": {}, **augmentation, **kept},
        }
    )
    config.evaluators = ConfigDict(
        {
            "reconstruction": {
                "name": "reconstruction",
                "data": {
                    "split": "validation",
                    "preprocess": {"decode_image": {}, **resize, **kept},
                },
                "every": duration(percent=5.0),
            }
        }
    )
    return config


def subwords(vocab_size, context_length):
    """A tokenizer of the published sizes: `file`, or one that is trained on the captions."""
    return ConfigDict(
        {
            "name": "subword",
            "file": placeholder(str),
            "pad": placeholder(str),  # None: the file's own token for it; "eos"
            "vocab_size": vocab_size,
            "context_length": context_length,
        }
    )


def big_vision_adafactor(config, b2):
    """The optimizer of google-research/big_vision at the settings that its configs share.

    lr 1e-3, wd 1e-4 (which is our `weight_decay` times the learning rate, see `adafactor`), of
    kernels alone (`wd_mults` in optax.py), clipped to a norm of 1: configs/proj/cappa/pretrain.py
    and configs/proj/clippo/train_clippo.py there.

    Args:
      b2: the bound on the decay of the second moment.
    """
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4 / 1e-3
    config.optimizer.b1, config.optimizer.b2 = 0.9, b2
    config.optimizer.clip_norm = 1.0
    config.optimizer.no_decay += ("embedding", "position_embedding", "class_token", "probe")
    return config

"""Data, evaluators, tokenizer and optimizers that the published recipes share.

Each recipe is a file in this folder. The source of a constant is written beside it. For all
recipes:

- Private datasets are replaced by LAION-400M as `tensorflow_datasets` prepares it
  (`laion400m/images`); ImageNet is its `imagenet2012`. To use other data, set
  `--config.data.source`, `--config.data.dataset` and the other keys of `config.data`.
- Without `--config.tokenizer.file` a byte-level BPE is trained on the captions, with the size of
  the published vocabulary. Its ids differ from the published tokenizer's.
- If you do not have ImageNet: `--config.evaluators.zero_shot=None`.
- Zero-shot ImageNet is scored with 7 prompts for each class, not with the 80 of Radford et al.
  2021.
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

# A subset of the 80 prompts that scores as well as all of them, from openai/CLIP,
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
# In lower case, because the training data's texts are (operation `lowercase` below).
CLASS_NAMES = tuple(
    line.lower()
    for line in Path(__file__).with_name("imagenet_class_names.txt").read_text().splitlines()
    if not line.startswith("#")
)

IMAGENET_EXAMPLES = 1_281_167
HELD_OUT = 10_000  # pairs at the start of the training data, held out for retrieval


def known_argument(arg, known=()):
    """Returns `arg`, or the first of `known` for None; raises UserError for an unknown argument."""
    if arg is None:
        return known[0] if known else None
    if arg not in known:
        listed = ", ".join(known) or "none"
        raise UserError(f"this config has no argument {arg!r} (known: {listed})")
    return arg


def long_run(config):
    """Sets logging and checkpoints for a run of days."""
    config.log.every = duration(steps=100)
    config.checkpoint.every = duration(steps=5_000)
    config.checkpoint.keep_last = 3
    return config


def shard_parameters(config):
    """Shards parameters and optimizer state over all devices, for models above the size B.

    On several slices or hosts with a slow network between them, use `--config.mesh.preset=hybrid`:
    it shards within each slice or host.
    """
    config.mesh.preset = "fsdp"
    return config


def image_text(augmentation, resize):
    """Makes a config with data and evaluators for image-text pretraining, without a model.

    Args:
      augmentation: operations on a decoded training image.
      resize: operations on a decoded evaluation image.
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
            # No value yet, but a type, against which an override is checked.
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
    """Makes a config with data and evaluators for pretraining on ImageNet, without a model.

    For the arguments see `image_text`.
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
    """Makes the section of a tokenizer with these sizes, from `file` or trained on the captions."""
    return ConfigDict(
        {
            "name": "subword",
            "file": placeholder(str),
            "pad": placeholder(str),  # "eos" pads with the end of text; None: the file's padding
            "vocab_size": vocab_size,
            "context_length": context_length,
        }
    )


def big_vision_adafactor(config, b2):
    """Sets the optimizer of google-research/big_vision, with the settings that its configs share.

    Their lr is 1e-3, and their wd is 1e-4 for kernels alone (`wd_mults` in optax.py). Our
    `weight_decay` times the learning rate is their wd, see `adafactor`. The gradient is clipped to
    the norm 1. Source: configs/proj/cappa/pretrain.py and configs/proj/clippo/train_clippo.py.

    Args:
      b2: upper bound of the decay of the second moment.
    """
    config.optimizer.name = "adafactor"
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4 / 1e-3
    config.optimizer.b1, config.optimizer.b2 = 0.9, b2
    config.optimizer.clip_norm = 1.0
    config.optimizer.no_decay += ("embedding", "position_embedding", "class_token", "probe")
    return config

"""CLIP on the embedded `shapes` at a size for a GPU; the base of the small runs.

The model has the form of published CLIP models, so it can be exported to Hugging Face's CLIPModel
and to open_clip.
"""

from ml_collections import ConfigDict

from vlp_jax.config import base, duration
from vlp_jax.data.shapes import vocabulary

TOWER = {"width": 192, "depth": 6, "mlp_dim": 768, "heads": 3}
# Fields of an image tower without a class token, which replace CLIP's form in small runs.
MEAN_POOLING = {
    "pooling": "mean",
    "class_token": False,
    "patch_bias": True,
    "pre_norm": False,
    "norm_eps": 1e-6,
}
PROBES = ("linear_probe", "knn", "few_shot")
TEMPLATES = ("{}", "a picture of {}", "there is {}", "an image of {}")


def test_data(where=None, limit=None):
    """Makes the data section of the test split, with detailed captions and no augmentation."""
    return {
        "split": "test",
        "where": where,
        "limit": limit,
        "preprocess": {
            "choose_text": {"index": 0},
            "decode_image": {},
            "resize": {},
        },
    }


def zero_shot(unseen):
    """Makes a zero-shot evaluator of color and shape, on combinations (un)seen in training."""
    return {
        "name": "zero_shot",
        "templates": TEMPLATES,
        "class_names": tuple(vocabulary.with_article(name) for name in vocabulary.CLASS_NAMES),
        "data": test_data({"num_objects": 1, "unseen": unseen}),
        "every": duration(percent=20.0),
    }


def probes(every, train_limit=10_000):
    """Makes the evaluators that train classifiers of the one object on frozen features."""
    data = {
        "data": test_data({"num_objects": 1, "unseen": False}),
        "train_data": {"split": "train", "limit": train_limit},
        "every": every,
    }
    sections = {name: {"name": name, **data} for name in PROBES}
    sections["linear_probe"]["grid"] = (1e-2, 1.0, 1e2, 1e4)
    sections["few_shot"]["shots"] = (1, 2, 4, 8, 16)
    return sections


def evaluators():
    """Makes all evaluators: cheap ones run often, expensive ones at the end."""
    every = duration(percent=20.0)
    return {
        "zero_shot": zero_shot(unseen=False),
        "zero_shot_unseen": zero_shot(unseen=True),
        "retrieval": {
            "name": "retrieval",
            "data": test_data(limit=1000),
            "every": every,
        },
        "retrieval_captions": {
            "name": "retrieval",
            "captions": "captions",
            "data": test_data(limit=1000),
            "every": duration(percent=100.0),
        },
        "geometry": {"name": "geometry", "data": test_data(limit=1000), "every": every},
        **probes(duration(percent=100.0)),
    }


def get_config(arg=None):
    del arg
    config = base()
    config.batch_size = 512
    config.image_size = 64
    config.duration = duration(epochs=40.0)
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "logit_scale_init": 1 / 0.07,
            "embed_dim": 192,
            "image": {
                "variant": "Ti/8",
                "pooling": "cls",
                "class_token": True,
                "patch_bias": False,
                "pre_norm": True,
                "norm_eps": 1e-5,
                **TOWER,
            },
            "text": {"variant": "Ti", "pooling": "eos", "causal": True, "norm_eps": 1e-5, **TOWER},
            "remat": "none",
        }
    )
    config.tokenizer = ConfigDict({"name": "subword", "vocab_size": 512, "context_length": 32})
    config.data = ConfigDict(
        {
            "source": "tfds",
            "dataset": "shapes",
            "split": "train",
            "data_dir": None,
            "preprocess": {
                "choose_text": {},
                "decode_image": {},
                "random_resized_crop": {"min_scale": 0.9},
                "flip_left_right": {},
                "keep": {"fields": ("image", "text")},
            },
        }
    )
    config.optimizer.weight_decay = 0.05
    config.evaluators = ConfigDict(evaluators())
    return config

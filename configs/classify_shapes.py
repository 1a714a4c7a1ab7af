"""Classification of `shapes` by the demo's image tower, minutes on two CPU cores.

    python -m vlp_jax.train --config configs/classify_shapes.py --workdir DIR \
        --config.init_from.source=demo/run

`:finetune` (the default) trains tower and head, by the form of He et al. 2022, table 9: layer-wise
decay, label smoothing, MixUp, stochastic depth. `:probe` trains the head of a tower that stays as
it is, as their table 10. Without `init_from.source` the tower starts from nothing, which only
`:finetune` can do with. The source is any run with such an `image` tower: CLIP or a masked
autoencoder (configs/mae_then_clip.py). Scenes of one object, whose label is its color and shape;
the head knows 48 classes, of which 8 are never seen in training.
"""

from ml_collections import ConfigDict

from configs import _recipes, demo
from vlp_jax.config import duration
from vlp_jax.data.shapes import vocabulary

CLASSES = len(vocabulary.CLASS_NAMES)
PREPROCESS = {
    "decode_image": {},
    "resize": {},
    "keep": {"fields": ("image", "label")},
}


def images(split, unseen=None, limit=None):
    """Scenes of one object of a split, of combinations (never) seen in training if that is said."""
    where = {"num_objects": 1} if unseen is None else {"num_objects": 1, "unseen": unseen}
    return {"split": split, "where": where, "limit": limit, "preprocess": PREPROCESS}


def evaluators():
    every = duration(percent=25.0)
    return {
        "accuracy": {"name": "accuracy", "data": images("test", False), "every": every},
        "accuracy_unseen": {"name": "accuracy", "data": images("test", True), "every": every},
        "loss": {"name": "loss", "data": images("validation"), "every": every},
        "robustness": {
            "name": "robustness",
            "data": images("test", False, limit=256),
            "corruptions": None,
            "severities": (1, 3, 5),
            "radii": (1, 2, 4, 8),
            "steps": 10,
            "every": duration(percent=100.0),
        },
    }


def get_config(arg=None):
    arg = _recipes.known_argument(arg, ("finetune", "probe"))
    config = demo.get_config()
    config.duration = duration(steps=300)
    config.objective = ConfigDict(
        {
            "name": "classification",
            "image": {**config.objective.image.to_dict(), "stochastic_depth": 0.1},
            "classes": CLASSES,
            "loss": "softmax",
            "label_smoothing": 0.1,
            "remat": "dots",
        }
    )
    config.tokenizer = ConfigDict()
    config.data.update(images("train"))
    config.data.preprocess = PREPROCESS
    config.data.batch_ops = {"mixup": {"alpha": 0.2, "num_classes": CLASSES}}
    config.init_from.rules = (("image/.*", "load"), (".*", "fresh"))
    config.optimizer.layer_decay.image = 0.65
    config.optimizer.learning_rate = 1e-3
    config.optimizer.muon.learning_rate = 5e-3
    config.evaluators = ConfigDict(evaluators())
    return probe(config) if arg == "probe" else config


def probe(config):
    config.objective.update({"label_smoothing": 0.0})
    config.objective.image.stochastic_depth = 0.0
    config.data.batch_ops = {}
    config.optimizer.name = "adamw"
    config.optimizer.frozen = ("image/.*",)
    config.optimizer.layer_decay.image = 1.0
    config.optimizer.learning_rate = 3e-3
    config.optimizer.weight_decay = 0.0
    return config

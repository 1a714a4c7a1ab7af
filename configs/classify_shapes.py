"""Classification of `shapes` with the demo's image tower: minutes on two CPU cores.

    python -m vlp_jax.train --config configs/classify_shapes.py --workdir DIR \
        --config.init_from.source=demo/run

`:finetune` (the default) trains tower and head in the form of He et al. 2022, table 9: layer-wise
decay, label smoothing, MixUp, stochastic depth. `:probe` trains the head on a frozen tower, as in
their table 10. The source is any run with an `image` tower of this form: CLIP or a masked
autoencoder (configs/mae_then_clip.py). Without a source the tower starts from random weights, with
which only `:finetune` makes sense.

A scene has one object, whose color and shape are its label. The head has 48 classes, 8 of which
never occur in training.
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
    """Makes the data section of scenes with one object; `unseen` None takes all combinations."""
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
    # Empty: a classifier has no text, and the demo's tokenizer would be trained for nothing.
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

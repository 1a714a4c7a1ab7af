"""CapPa's captioning on the embedded `shapes`: minutes on two CPU cores.

    python -m vlp_jax.train --config configs/cap_shapes.py --workdir DIR

The image tower has the demo's size and learns from captions alone. Half of the captions are
predicted token by token, and half in parallel. Evaluation generates captions, and classifies by the
likelihood of captions that name the classes.
"""

from ml_collections import ConfigDict

from configs import clip_shapes, demo
from vlp_jax.config import duration


def get_config(arg=None):
    config = demo.get_config(arg)
    config.duration = duration(steps=800)
    config.objective = ConfigDict(
        {
            "name": "captioning",
            "parallel_share": 0.5,
            "image": {
                "variant": "Ti/16",
                **demo.TOWER,
                "depth": 2,
            },
            "decoder": {"variant": "Ti", **demo.TOWER, "depth": 1},
            "remat": "dots",
        }
    )
    config.data.preprocess.choose_text = ConfigDict({"index": 0})  # the caption of all objects
    one_object = clip_shapes.test_data({"num_objects": 1, "unseen": False})
    unseen = clip_shapes.test_data({"num_objects": 1, "unseen": True})
    likelihood = {"name": "likelihood", "template": "a {}"}
    captions = {"name": "captions", "label_field": "label"}
    config.evaluators = ConfigDict(
        {
            "loss": {"name": "loss", "data": clip_shapes.test_data(limit=1000)},
            "captions": {"name": "captions", "data": clip_shapes.test_data(limit=1000)},
            "one_object": {**captions, "data": one_object},
            "one_object_unseen": {**captions, "data": unseen},
            "likelihood": {**likelihood, "data": one_object},
        }
    )
    for evaluator in config.evaluators.values():
        evaluator.every = duration(percent=25.0)
    return config

"""Retrieval on `shapes`: the demo tuned on detailed captions, a minute on two CPU cores.

    python -m vlp_jax.train --config configs/retrieval_shapes.py --workdir DIR \
        --config.init_from.source=demo/run --config.tokenizer.file=demo/run/tokenizer.json

The demo learns from captions that name a part of a scene. This config continues from its weights
with a tenth of its learning rates, on captions that name all objects. Retrieval is scored with such
captions.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import clip_shapes, demo
from vlp_jax.config import duration


def get_config(arg=None):
    config = demo.get_config(arg)
    config.duration = duration(steps=100)
    config.tokenizer.file = placeholder(str)
    config.data.preprocess.choose_text = {"index": 0}
    config.optimizer.learning_rate /= 10
    config.optimizer.muon.learning_rate /= 10
    validation = clip_shapes.test_data()
    validation["split"] = "validation"
    config.evaluators.loss = ConfigDict(
        {
            "name": "loss",
            "batch_size": config.batch_size,
            "data": validation,
            "every": duration(percent=25.0),
        }
    )
    return config

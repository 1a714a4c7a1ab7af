"""Questions about `shapes`, answered from a closed list of 42: minutes on two CPU cores.

    python -m vlp_jax.train --config configs/vqa_shapes.py --workdir DIR \
        --config.init_from.source=demo/run --config.tokenizer.file=demo/run/tokenizer.json

The towers come from the demo; the Transformer over the tokens of both is new. A scene has six
questions, of ten kinds. A training step sees one of them, and evaluation asks all. Without
`init_from.source` everything starts from random weights, and without `tokenizer.file` the tokenizer
is trained on the questions.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import demo
from vlp_jax.config import duration
from vlp_jax.data.shapes import vocabulary
from vlp_jax.data.shapes.questions import QUESTIONS_PER_SCENE


def preprocess(index=None, fields=("image", "text", "answer")):
    return {
        "choose_question": {"index": index},
        "decode_image": {},
        "resize": {},
        "keep": {"fields": fields},
    }


def get_config(arg=None):
    config = demo.get_config(arg)
    config.duration = duration(steps=600)
    config.objective = ConfigDict(
        {
            "name": "question_answering",
            "image": config.objective.image.to_dict(),
            "text": config.objective.text.to_dict(),
            "fusion": {"depth": 2, **demo.TOWER},
            "answers": len(vocabulary.ANSWERS),
            "loss": "softmax",
            "remat": "dots",
        }
    )
    config.tokenizer.file = placeholder(str)
    config.data.preprocess = preprocess()
    config.init_from.rules = (("(image|text)/.*", "load"), (".*", "fresh"))
    every = duration(percent=25.0)
    with_kind = ("image", "text", "answer", "kind")
    config.evaluators = ConfigDict(
        {
            "answers": {
                "name": "answers",
                "questions": QUESTIONS_PER_SCENE,
                "data": {"split": "test", "limit": 500, "preprocess": preprocess(0, with_kind)},
                "every": every,
            },
            "loss": {
                "name": "loss",
                "data": {"split": "validation", "preprocess": preprocess(0)},
                "every": every,
            },
        }
    )
    return config

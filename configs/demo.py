"""CLIP on the embedded `shapes`: minutes on two CPU cores. The config of `make demo`."""

from ml_collections import ConfigDict

from vlp_jax.config import base, duration

TEMPLATES = (
    "a {}.",
    "there is a {}.",
    "a picture of a {}.",
    "one {}.",
)


def get_config(arg=None):
    config = base()
    config.batch_size = 256
    config.duration = duration(epochs=6.0)
    tower = {"width": 128, "mlp_dim": 512, "heads": 4}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "embed_dim": 128,
            "image": {"variant": "Ti/16", "image_size": 64, "pooling": "mean", "depth": 4, **tower},
            "text": {"variant": "Ti", "pooling": "eos", "depth": 2, **tower},
            "remat": "dots",
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
                "resize": {"size": 64},
                "keep": {"fields": ("image", "text")},
            },
        }
    )
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.05
    config.optimizer.warmup = duration(percent=5.0)
    config.log.every = duration(steps=10)
    config.checkpoint.every = duration(percent=25.0)

    def on_test(where, limit=None):
        return {
            "split": "test",
            "where": where,
            "limit": limit,
            "preprocess": {
                "choose_text": {"index": 0},
                "decode_image": {},
                "resize": {"size": 64},
            },
        }

    def zero_shot(unseen):
        return {
            "name": "zero_shot",
            "templates": TEMPLATES,
            "data": on_test({"num_objects": 1, "unseen": unseen}),
            "every": duration(percent=25.0),
        }

    config.evaluators = ConfigDict(
        {
            "zero_shot": zero_shot(unseen=False),
            "zero_shot_unseen": zero_shot(unseen=True),
            "retrieval": {
                "name": "retrieval",
                "data": on_test(None, limit=1000),
                "every": duration(percent=25.0),
            },
        }
    )
    return config

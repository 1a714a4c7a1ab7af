"""CLIP on the embedded `shapes` in minutes on two CPU cores: the config of `make demo`."""

from configs import clip_shapes
from vlp_jax.config import duration

TOWER = {"width": 128, "mlp_dim": 512, "heads": 4}  # CLIP's form, which other libraries can load


def get_config(arg=None):
    config = clip_shapes.get_config(arg)
    config.batch_size = 128
    config.duration = duration(steps=500)
    # Within the demo's steps Muon learns colors and shapes; AdamW learns only colors.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-4
    config.optimizer.muon.learning_rate = 0.01
    config.optimizer.warmup = duration(percent=10.0)
    config.objective.embed_dim = 128
    config.objective.image.update({"variant": "Ti/16", **TOWER, "depth": 2})
    config.objective.text.update({**TOWER, "depth": 1})
    config.objective.remat = "dots"  # XLA fuses the backward pass badly on CPU otherwise
    config.data.preprocess = {
        "choose_text": {},
        "decode_image": {},
        "resize": {},
        "keep": {"fields": ("image", "text")},
    }
    config.checkpoint.every = duration(percent=25.0)
    for name in ("retrieval_captions", *clip_shapes.PROBES):
        del config.evaluators[name]
    for evaluator in config.evaluators.values():
        evaluator.every = duration(percent=25.0)
    # Cheap: it has the data of `retrieval`, and shares the embeddings.
    config.evaluators.geometry.every = duration(percent=100.0)
    return config

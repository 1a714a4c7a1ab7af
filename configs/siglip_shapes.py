"""SigLIP on the embedded `shapes`: sigmoid loss, bidirectional text, attention pooling.

The model has the form of published SigLIP models, so it can be exported to Hugging Face's
SiglipModel.
"""

from configs import clip_shapes


def get_config(arg=None):
    config = clip_shapes.get_config(arg)
    config.objective.loss = "sigmoid"
    config.objective.image.update({**clip_shapes.MEAN_POOLING, "pooling": "map"})
    config.objective.text.update(causal=False, pooling="last", norm_eps=1e-6)
    config.objective.image_head = "none"
    config.objective.text_head = "linear_bias"
    return config

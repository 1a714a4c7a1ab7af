"""SigLIP on the embedded `shapes`: sigmoid loss, bidirectional text, attention pooling."""

from configs import clip_shapes


def get_config(arg=None):
    config = clip_shapes.get_config(arg)
    config.objective.loss = "sigmoid"
    config.objective.image.pooling = "map"
    config.objective.text.causal = False
    config.objective.text.pooling = "map"
    return config

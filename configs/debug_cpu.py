"""`configs/debug_gpu.py` with tiny towers and little data: about a minute on two CPU cores.

    python -m vlp_jax.train --config configs/debug_cpu.py --workdir DIR

Use it to see that an installation, or a change of the code, runs: training, evaluation,
checkpoints, resuming. It learns next to nothing.
"""

from configs import debug_gpu
from vlp_jax.config import duration

TOWER = {"width": 64, "depth": 2, "mlp_dim": 256, "heads": 2}


def get_config(arg=None):
    config = debug_gpu.get_config(arg)
    config.batch_size = 64
    config.image_size = 64
    config.duration = duration(steps=40)
    config.objective.dtype = "float32"
    config.objective.embed_dim = 64
    config.objective.image.update(variant="Ti/16", **TOWER)
    config.objective.text.update(variant="Ti", **TOWER)
    config.data.dataset = "shapes/tiny"
    for evaluator in config.evaluators.values():
        evaluator.every = duration(percent=50.0)
    return config

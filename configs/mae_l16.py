"""Masked autoencoder, ViT-L/16 on ImageNet (He et al. 2022, arXiv:2111.06377).

Aims at: He et al. 2022, table 3, ViT-L, ImageNet 85.9 after fine-tuning. (With 800 epochs:
85.4, table 1d; 85.5 in facebookresearch/mae, PRETRAIN.md.)

    python -m vlp_jax.train --config configs/mae_l16.py --workdir DIR

`configs/mae_b16.py` with a larger encoder; see there for everything else.
"""

from configs import _recipes, mae_b16


def get_config(arg=None):
    config = _recipes.shard_parameters(mae_b16.get_config(arg))
    config.objective.image.variant = "L/16"
    config.objective.remat = "dots"
    return config

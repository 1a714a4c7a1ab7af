"""Masked autoencoder, ViT-H/14 on ImageNet (He et al. 2022, arXiv:2111.06377).

Aims at: He et al. 2022, table 3, ViT-H, ImageNet 86.9 after fine-tuning at 224 pixels.

    python -m vlp_jax.train --config configs/mae_h14.py --workdir DIR

`configs/mae_l16.py` with a larger encoder; for everything else see `configs/mae_b16.py`.
"""

from configs import mae_l16


def get_config(arg=None):
    config = mae_l16.get_config(arg)
    config.objective.image.variant = "H/14"
    return config

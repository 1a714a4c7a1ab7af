"""Masked autoencoder, ViT-B/16 on ImageNet (He et al. 2022, arXiv:2111.06377).

Aims at: He et al. 2022, table 3, ViT-B, ImageNet 83.6 after fine-tuning.

    python -m vlp_jax.train --config configs/mae_b16.py --workdir DIR

Sources: table 8 of the paper, with the 1,600 epochs of its final models. (Its ablations have 800:
--config.duration.epochs=800.) Sizes of the decoder: section 4.1 and facebookresearch/mae,
models_mae.py.

A contrastive config whose image tower has the same form (a class token, "sincos" positions,
activation "gelu") can start from it, without its decoder:

    --config.init_from.source=DIR
    --config.init_from.rules="(('decoder/.*','skip'),('image/.*','load'),('.*','fresh'))"

Differences: evaluation is the reconstruction error on the validation split. Fine-tuning on ImageNet
would use the objective `classification` (docs/downstream.md); there is no config for it here.
"""

from ml_collections import ConfigDict

from configs import _recipes
from vlp_jax.config import duration


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = _recipes.imagenet(
        augmentation={
            "random_resized_crop": {"min_scale": 0.2, "method": "bicubic"},
            "flip_left_right": {"unless_text": None},
        },
        resize={"resize_shortest_and_center_crop": {}},
    )
    config.batch_size = 4096
    config.duration = duration(epochs=1600.0)
    config.objective = ConfigDict(
        {
            "name": "masked_autoencoding",
            "image": {
                "variant": "B/16",
                "class_token": True,
                "position": "sincos",
                "activation": "gelu",
                "norm_eps": 1e-6,
            },
            "decoder": {"width": 512, "depth": 8, "mlp_dim": 2048, "heads": 16},
            "mask_ratio": 0.75,
            "normalize_targets": True,
            **_recipes.IMAGENET_PIXELS,
            "remat": "none",
        }
    )
    config.optimizer.learning_rate = 1.5e-4 * config.batch_size / 256
    config.optimizer.warmup = duration(epochs=40.0)
    config.optimizer.b1, config.optimizer.b2 = 0.9, 0.95
    config.optimizer.weight_decay = 0.05
    config.optimizer.clip_norm = 0.0
    return config

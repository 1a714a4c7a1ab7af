"""CLIP ViT-L/14 at 224 pixels (Radford et al. 2021, arXiv:2103.00020).

Aims at: Radford et al. 2021, table 11, ViT-L/14, zero-shot ImageNet 75.3. (open_clip: 72.8 when
trained on LAION-400M.)

    python -m vlp_jax.train --config configs/clip_l14.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

`configs/clip_b16.py` with larger towers and a smaller learning rate (table 20); see there for the
differences from the paper. The paper's further epoch at 336 pixels is not included.
"""

from configs import _recipes, clip_b16


def get_config(arg=None):
    config = _recipes.shard_parameters(clip_b16.get_config(arg))
    config.objective.image.variant = "L/14"
    config.objective.text.variant = "B"
    config.objective.embed_dim = 768
    config.objective.remat = "full"
    config.optimizer.learning_rate = 4e-4
    return config

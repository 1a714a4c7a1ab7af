"""CLIP ViT-B/32 at 224 pixels (Radford et al. 2021, arXiv:2103.00020).

Aims at: Radford et al. 2021, table 11, ViT-B/32, zero-shot ImageNet 63.2. (open_clip: 62.9 when
trained on LAION-400M.)

    python -m vlp_jax.train --config configs/clip_b32.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

`configs/clip_b16.py` with larger patches; see there for the differences from the paper.
"""

from configs import clip_b16


def get_config(arg=None):
    config = clip_b16.get_config(arg)
    config.objective.image.variant = "B/32"
    config.objective.remat = "none"
    return config

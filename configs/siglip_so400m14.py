"""SigLIP with the shape-optimized So400m/14 towers (Zhai et al. 2023, arXiv:2303.15343).

Aims at: Zhai et al. 2023, table 3 (version 4 of the paper), So400m/14: zero-shot ImageNet 82.2 at
224 pixels, 83.2 at 384.

    python -m vlp_jax.train --config configs/siglip_so400m14.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON
    python -m vlp_jax.train --config configs/siglip_so400m14.py:378 ...

The argument is the image size. Texts have 16 tokens at 224 pixels and 64 tokens at 378, as in the
two published models (google-research/big_vision, configs/proj/image_text/SigLIP_demo.ipynb). The
second model is named after 384 pixels, of which its patches of 14 cover 378.

`configs/siglip_b16.py` with other towers; see there for the differences from the paper. The larger
resolution is trained from the start here; the published model was trained on from a smaller one.
1152 is no multiple of 256: on 256 devices set --config.mesh.fsdp=64 (or 128, 16).
"""

from configs import _recipes, siglip_b16

CONTEXT_LENGTHS = {"224": 16, "378": 64}


def get_config(arg=None):
    size = _recipes.known_argument(arg, tuple(CONTEXT_LENGTHS))
    config = _recipes.shard_parameters(siglip_b16.get_config())
    config.objective.image.variant = "So400m/14"
    config.objective.text.variant = "So400m"
    config.objective.embed_dim = 1152
    config.objective.remat = "full"
    config.image_size = int(size)
    config.tokenizer.context_length = CONTEXT_LENGTHS[size]
    return config

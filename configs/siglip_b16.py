"""SigLIP ViT-B/16 at 224 pixels (Zhai et al. 2023, arXiv:2303.15343).

Aims at: Zhai et al. 2023, table 3 (version 4 of the paper), ViT-B/16 at 224 pixels, zero-shot
ImageNet 76.2.

    python -m vlp_jax.train --config configs/siglip_b16.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

Sources: google-research/big_vision, configs/proj/image_text/SigLIP_demo.ipynb, for the form of the
model, initial scale and bias, 64 tokens, a vocabulary of 32,000, and pixels; the paper for the
batch and b2 = 0.95. The published tokenizer is the tokenizer.json of
google/siglip-base-patch16-224.

Differences:
- LAION-400M replaces the private WebLI.
- The paper does not give the schedule of the released models. This is SigLIP 2's (Tschannen et al.
  2025, arXiv:2502.14786): cosine, 20,000 steps of warm-up, 40 billion examples.
- Weight decay and learning rate come from the authors' other configs
  (`_recipes.big_vision_adafactor`).
- Texts are put in lower case, and punctuation stays.
- Padding is the tokenizer file's own. Published models pad with the end of text: set
  --config.tokenizer.pad=eos. To read a .model file, set --config.tokenizer.name=sentencepiece.
"""

from ml_collections import ConfigDict

from configs import _recipes
from vlp_jax.config import duration

# big_vision's `resize`: to a square, bilinear, not antialiased (pp/ops_image.py, `get_resize`).
RESIZE = {"resize": {"method": "bilinear", "antialias": False}}


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = _recipes.image_text(augmentation=RESIZE, resize=RESIZE)
    config.batch_size = 32_768
    config.duration = duration(examples=40_000_000_000)
    tower = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "sigmoid",
            "loss_form": "blocked",
            "logit_scale_init": 10.0,
            "logit_bias_init": -10.0,
            "max_logit_scale": 0.0,  # no bound: the demo's published model has learned 118
            "embed_dim": 768,
            "image_head": "none",
            "text_head": "linear_bias",
            "image": {"variant": "B/16", "pooling": "map", **tower},
            "text": {"variant": "B", "causal": False, "pooling": "last", **tower},
            **_recipes.HALF_PIXELS,
            "remat": "dots",
        }
    )
    config.tokenizer = _recipes.subwords(vocab_size=32_000, context_length=64)
    config.optimizer.warmup = duration(steps=20_000)
    return _recipes.big_vision_adafactor(config, b2=0.95)

"""LiT: trains a text tower for a frozen ViT-B/16 (Zhai et al. 2022, arXiv:2111.07991).

Aims at: the model LiT-B16B_2 of Zhai et al. 2022 on public data, zero-shot ImageNet 73.9
(google-research/big_vision, configs/proj/image_text/README_lit.md; the paper's own models are in
table 1).

    python -m vlp_jax.train --config configs/lit_b16.py --workdir DIR \
        --config.init_from.source=big_vision:FILE.npz

The locked tower is the ViT-B/16 of "How to train your ViT" (Steiner et al. 2021), trained on
ImageNet-21k. Its file (`SOURCE`, published in the bucket gs://vit_models/augreg) must be in the
working directory, unless `init_from.source` names another. As in LiT-B16B_2, images have no head,
texts have a linear head and 16 tokens, and training takes 60,000 steps.

Differences: LAION-400M replaces CC12M and YFCC100M. The text tower has SigLIP's form and starts
from random weights, with 32,000 tokens from a tokenizer.json or trained on the captions; the
published one starts from BERT-base with its word pieces. Images are resized and not augmented. The
batch of 16,384 is the paper's. Optimizer and warm-up come from the authors' later configs
(google-research/big_vision, configs/proj/cappa/pretrain.py).
"""

from ml_collections import ConfigDict

from configs import _recipes, siglip_b16
from vlp_jax.config import duration

# google-research/big_vision, configs/proj/image_text/common.py, `inits`
SOURCE = "B_16-i21k-300ep-lr_0.001-aug_medium1-wd_0.1-do_0.0-sd_0.0.npz"


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = _recipes.image_text(augmentation=siglip_b16.RESIZE, resize=siglip_b16.RESIZE)
    config.batch_size = 16_384
    config.duration = duration(steps=60_000)
    tower = {"activation": "gelu_tanh", "norm_eps": 1e-6}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "loss_form": "blocked",
            "logit_scale_init": 10.0,  # `temperature_init` in big_vision's config for COCO
            "max_logit_scale": 0.0,
            "embed_dim": 768,
            "image_head": "none",
            "text_head": "linear_bias",
            "image": {
                "variant": "B/16",
                "pooling": "cls",
                "class_position": False,  # on reading, it is added to the class token
                **tower,
            },
            "text": {"variant": "B", "causal": False, "pooling": "last", **tower},
            **_recipes.HALF_PIXELS,
            "remat": "none",
        }
    )
    config.tokenizer = _recipes.subwords(vocab_size=32_000, context_length=16)
    config.init_from.source = f"big_vision:{SOURCE}"
    config.init_from.rules = (("image/.*", "load"), (".*", "fresh"))
    config.optimizer.warmup = duration(steps=10_000)
    config.optimizer.frozen = ("image/.*",)
    return _recipes.big_vision_adafactor(config, b2=0.999)

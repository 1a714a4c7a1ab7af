"""CoCa ViT-B/32 at 224 pixels (Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text
Foundation Models", arXiv:2205.01917) in open_clip's form and sizes.

Aims at: open_clip, docs/openclip_results.csv, coca_ViT-B-32 trained on LAION-2B
(laion2b_s13b_b90k), zero-shot ImageNet 63.6.

    python -m vlp_jax.train --config configs/coca_b32.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

Sources: open_clip, model_configs/coca_ViT-B-32.json, for the sizes; the name of its weights for 13
billion examples and a batch of 90 thousand; its defaults for the weights of the losses. The
published tokenizer is the tokenizer.json of openai/clip-vit-base-patch16 (49,408 ids).

Differences: LAION-400M replaces LAION-2B. Learning rate, warm-up and optimizer of the published run
are unknown; these are open_clip's defaults (open_clip_train/params.py). The text's class token has
weight decay here, and none in open_clip.
"""

from ml_collections import ConfigDict

from configs import _recipes
from vlp_jax.config import duration


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = _recipes.image_text(
        augmentation={"resize_shortest_and_random_crop": {}},
        resize={"resize_shortest_and_center_crop": {}},
    )
    config.batch_size = 90_112
    config.duration = duration(examples=13_000_000_000)
    tower = {"activation": "gelu", "norm_eps": 1e-5}
    config.objective = ConfigDict(
        {
            "name": "coca",
            "loss_form": "blocked",
            "logit_scale_init": 1 / 0.07,
            "max_logit_scale": 100.0,
            "contrast_weight": 1.0,
            "caption_weight": 2.0,
            "embed_dim": 512,
            "queries": 256,
            "pooler_heads": 8,
            "image": {
                "variant": "B/32",
                "patch_bias": False,
                "pre_norm": True,
                **tower,
            },
            "text": {"variant": "M", **tower},
            "decoder": {"variant": "M", **tower},
            **_recipes.CLIP_PIXELS,
            "remat": "dots",
        }
    )
    # CLIP's 77 places, less one for the text's class token.
    config.tokenizer = _recipes.subwords(vocab_size=49_408, context_length=76)
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup = duration(steps=10_000)
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.98, 1e-6
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 0.0  # open_clip does not clip gradients by default
    pairs = config.evaluators.retrieval
    config.evaluators.captions = ConfigDict(
        {
            "name": "captions",
            "references": "text_raw",
            # A part, because captions are generated token by token.
            "data": {**pairs.data.to_dict(), "limit": 2_000},
            "every": pairs.every,
        }
    )
    return config

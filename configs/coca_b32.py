"""CoCa ViT-B/32 at 224 pixels (Yu et al. 2022, "CoCa: Contrastive Captioners are Image-Text
Foundation Models", arXiv:2205.01917) in the form and sizes that open_clip gives it.

Aims at: open_clip, docs/openclip_results.csv, coca_ViT-B-32 trained on LAION-2B
(laion2b_s13b_b90k), zero-shot ImageNet 63.6.

    python -m vlp_jax.train --config configs/coca_b32.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

Sizes come from open_clip, model_configs/coca_ViT-B-32.json; examples and batch are the 13
billion and 90 thousand in the name of its weights; the losses' weights are its defaults. The
published tokenizer is the tokenizer.json of openai/clip-vit-base-patch16 (49,408 ids).

What differs: LAION-400M for LAION-2B. Learning rate, warm-up and optimizer of that run are not
published with its weights: those here are the defaults of open_clip (open_clip_train/params.py),
and its class token of the text, which has no weight decay there, has some here.
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
    config.tokenizer = _recipes.subwords(vocab_size=49_408, context_length=76)
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup = duration(steps=10_000)
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.98, 1e-6
    config.optimizer.weight_decay = 0.2
    config.optimizer.clip_norm = 0.0  # open_clip has none by default
    pairs = config.evaluators.retrieval
    config.evaluators.captions = ConfigDict(
        {
            "name": "captions",
            "references": "text_raw",
            "data": {**pairs.data.to_dict(), "limit": 2_000},
            "every": pairs.every,
        }
    )
    return config

"""CLIP ViT-B/16 at 224 pixels (Radford et al. 2021, arXiv:2103.00020).

Aims at: Radford et al. 2021, table 11, ViT-B/16, zero-shot ImageNet 68.6. (open_clip measures 68.3
for OpenAI's weights, and 67.1 for its own that were trained on LAION-400M.)

    python -m vlp_jax.train --config configs/clip_b16.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

Learning rates and widths come from table 20, the rest of the optimizer from table 18, the form of
the model from openai/CLIP, clip/model.py. The published tokenizer is the tokenizer.json
of openai/clip-vit-base-patch16 (49,408 ids); without a file see `configs/_recipes.py`.

What differs: LAION-400M for the private WIT of 400 million pairs, of which 32 epochs are 12.8
billion examples whatever the size of the data here; the logits' factor is bounded in the loss
instead of the parameter being clipped; computation is bfloat16, not float16.
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
    config.batch_size = 32_768
    config.duration = duration(examples=32 * 400_000_000)
    tower = {"activation": "quick_gelu", "norm_eps": 1e-5}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "loss_form": "blocked",
            "logit_scale_init": 1 / 0.07,
            "max_logit_scale": 100.0,
            "embed_dim": 512,
            "image": {
                "variant": "B/16",
                "pooling": "cls",
                "patch_bias": False,
                "pre_norm": True,
                **tower,
            },
            "text": {"variant": "M", "causal": True, "pooling": "eos", **tower},
            **_recipes.CLIP_PIXELS,
            "remat": "dots",
        }
    )
    config.tokenizer = _recipes.subwords(vocab_size=49_408, context_length=77)
    config.optimizer.learning_rate = 5e-4
    config.optimizer.warmup = duration(steps=2_000)
    config.optimizer.b1, config.optimizer.b2, config.optimizer.eps = 0.9, 0.98, 1e-6
    config.optimizer.weight_decay = 0.2  # of all weights that are not gains or biases (2.5)
    config.optimizer.clip_norm = 0.0  # the paper has none
    return config

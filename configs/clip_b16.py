"""CLIP ViT-B/16 at 224 pixels (Radford et al. 2021, arXiv:2103.00020).

Aims at: Radford et al. 2021, table 11, ViT-B/16, zero-shot ImageNet 68.6. (open_clip measures 68.3
for OpenAI's weights, and 67.1 for its own that were trained on LAION-400M.)

    python -m vlp_jax.train --config configs/clip_b16.py --workdir DIR \
        --config.tokenizer.file=TOKENIZER_JSON

Sources: table 20 for learning rates and widths, table 18 for the optimizer, openai/CLIP,
clip/model.py, for the form of the model. The published tokenizer is the tokenizer.json of
openai/clip-vit-base-patch16 (49,408 ids); without a file see `configs/_recipes.py`.

Differences: LAION-400M replaces the private WIT of 400 million pairs. The duration is 12.8 billion
examples, 32 epochs of WIT. The logit scale is bounded in the loss, instead of clipping the
parameter. Computation is in bfloat16, not float16.
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
            # The plain form gives each device the logits of its images against all 32,768 texts.
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
    config.optimizer.weight_decay = 0.2  # for all weights except gains and biases (section 2.5)
    config.optimizer.clip_norm = 0.0  # the paper does not clip gradients
    return config

"""CLIP on a folder of image files with a CSV, TSV or JSONL of path and caption.

    python -m vlp_jax.train --config configs/clip_folder.py --workdir DIR --config.data.path=DIR

About a tenth of the images, chosen by a hash of their path, is held out for retrieval. The argument
is the image size, as in `configs/clip_folder.py:128`. The default of 64 suits a first look on a
CPU.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import clip_shapes
from vlp_jax.config import duration

TOWER = {"width": 128, "mlp_dim": 512, "heads": 4}


def get_config(arg=None):
    size = int(arg or 64)
    config = clip_shapes.get_config()
    config.batch_size = 128
    config.image_size = size
    config.duration = duration(epochs=30.0)
    config.objective.image.update(variant="Ti/16", depth=4, **TOWER)
    config.objective.image.update(**clip_shapes.MEAN_POOLING)
    config.objective.text.update(depth=2, norm_eps=1e-6, **TOWER)
    config.objective.embed_dim = 128
    # With a few thousand pictures, Muon retrieves twice as many held-out ones as AdamW in the same
    # epochs: docs/real_pictures.md.
    config.optimizer.name = "muon"
    config.optimizer.learning_rate = 8e-4
    config.optimizer.muon.learning_rate = 0.01
    config.optimizer.warmup = duration(percent=10.0)
    config.objective.remat = "dots"
    config.tokenizer = ConfigDict({"name": "subword", "vocab_size": 4096, "context_length": 32})
    config.data = ConfigDict(
        {
            "source": "folder",
            "split": "train",
            "preprocess": {
                "choose_text": {},
                "decode_image": {"min_side": 2 * size},
                # Nearly whole and never mirrored: smaller crops train worse, even where each
                # picture is seen 15 times (docs/real_pictures.md).
                "random_resized_crop": {"min_scale": 0.8},
                "keep": {"fields": ("image", "text")},
            },
        }
    )
    config.data.path = placeholder(str)
    config.evaluators = ConfigDict(
        {
            "retrieval": {
                "name": "retrieval",
                "data": {
                    "split": "validation",
                    "preprocess": {
                        "choose_text": {"index": 0},
                        "decode_image": {"min_side": 2 * size},
                        "resize_shortest_and_center_crop": {},
                    },
                },
                "every": duration(percent=20.0),
            }
        }
    )
    return config

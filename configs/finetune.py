"""Goes on from weights, with the model, tokenizer and preprocessing of the source.

    python -m vlp_jax.train --config configs/finetune.py --workdir DIR \
        --config.init_from.source=hf:FOLDER --config.data.path=PICTURES

The source is a run's workdir, hf:DIR, open_clip:FILE, big_vision:FILE.npz or timm:FILE; the data is
a folder of pictures with a CSV of captions (docs/data.md). What is to differ from the source is an
override, and the weights are adapted:

    --config.image_size=336                positions are resampled
    --config.objective.image.pooling=map   what the source does not have starts from the seed
    --config.objective.name=classification --config.objective.classes=10

The table of all parameters is in DIR/init_from.txt. The learning rate is a hundredth of CLIP's, as
FLIP's last stage has it (Li et al. 2023, "unmasking").
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import _recipes
from vlp_jax.config import base, duration


def get_config(arg=None):
    _recipes.known_argument(arg)
    config = base()
    config.batch_size = 128
    config.duration = duration(epochs=5.0)
    config.init_from.model = True
    # Empty sections are filled from the source, and an override can set their keys.
    config.objective = ConfigDict({"image": {}, "text": {}})
    config.optimizer.learning_rate = 5e-6
    config.optimizer.warmup = duration(percent=10.0)
    text = {"choose_text": {}, "decode_image": {}}
    config.data = ConfigDict(
        {
            "source": "folder",
            "split": "train",
            "preprocess": {**text, "keep": {"fields": ("image", "text")}},
        }
    )
    config.data.path = placeholder(str)
    # Always the first caption, so that scores do not depend on a draw.
    held_out = {"split": "validation", "preprocess": {**text, "choose_text": {"index": 0}}}
    retrieval = {"name": "retrieval", "data": held_out, "every": duration(percent=20.0)}
    config.evaluators = ConfigDict({"retrieval": retrieval})
    return config

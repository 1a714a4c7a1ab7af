"""CLIP on WebDataset tar shards with KEY.jpg and KEY.txt, as img2dataset writes them.

    python -m vlp_jax.train --config configs/clip_webdataset.py --workdir DIR \
        --config.data.path='SHARDS/{00000..00041}.tar' \
        --config.evaluators.retrieval.data.path=HELD_OUT.tar

The argument is the image size, 64 by default, as in `clip_folder`. Other formats and mixtures:
docs/data.md.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from configs import clip_folder


def get_config(arg=None):
    config = clip_folder.get_config(arg)
    for data in (config.data, config.evaluators.retrieval.data):
        del data.preprocess["choose_text"]
        data.path = placeholder(str)
    config.data.source = "webdataset"
    config.data.fields = ConfigDict({"image": "image", "text": "text"})
    del config.data["split"]
    del config.evaluators.retrieval.data["split"]
    config.evaluators.retrieval.data.limit = 1000
    return config

"""Shrinks any config to a run of two steps on tiny shapes, for tests and for a first look."""

from __future__ import annotations

from ml_collections import ConfigDict

from vlp_jax.config import complete, duration
from vlp_jax.evaluators import EVALUATORS
from vlp_jax.models.values import split_variant
from vlp_jax.preprocess import smoke_preprocess

# Sizes of models, set wherever these keys appear in the objective.
SMOKE_SIZES = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2, "embed_dim": 32}
SMOKE_PATCHES = 2  # patches along one side of an image
SMOKE_BATCH_SIZE = 16


def smoke(config: ConfigDict) -> ConfigDict:
    """Returns a copy of `config` that runs 2 steps on tiny shapes and the embedded data."""
    config = config.copy_and_resolve_references()
    complete(config)
    config.unlock()
    if config.init_from.model and "name" not in config.objective:
        _stand_in(config)
    config.duration = duration(steps=2)
    for part in (config.optimizer.warmup, config.optimizer.cooldown):
        # A percentage shrinks with the duration by itself.
        part.update(duration(steps=1) if part.percent is None else {})
    config.batch_size = SMOKE_BATCH_SIZE
    config.init_from.source = config.init_from.step = None
    config.init_from.model = False
    config.init_from.sources = ConfigDict()
    config.log.every = duration(steps=1)
    config.checkpoint.every = duration(steps=2)
    config.writers.tensorboard = False
    config.writers.wandb.enabled = False
    image_size = config.image_size = _shrink_models(config.objective)
    if config.tokenizer:
        config.tokenizer.context_length = 16
    if config.tokenizer.get("name", "bytes") != "bytes":  # its file may not exist on this machine
        config.tokenizer.update({"name": "subword", "vocab_size": 300, "file": None})
    config.data = _smoke_data(config.data, "train", image_size)
    for name, data in config.extra_data.items():
        config.extra_data[name] = _smoke_data(data, "train", image_size)
    for evaluator in config.evaluators.values():
        evaluator.every = duration(steps=2)
        small = EVALUATORS[evaluator.name].SMOKE | {"batch_size": SMOKE_BATCH_SIZE}
        evaluator.update({key: value for key, value in small.items() if key in evaluator})
        if "data" in evaluator:
            evaluator.data = _smoke_data(evaluator.data, "test", image_size)
            # One example more than whole batches, so that the padding of the last one is at work
            # too.
            evaluator.data.limit = 2 * SMOKE_BATCH_SIZE + 1
        if "train_data" in evaluator:
            evaluator.train_data = _smoke_data(evaluator.train_data, "train", image_size)
            evaluator.train_data.limit = 4 * SMOKE_BATCH_SIZE + 1
    return config.lock()


def _stand_in(config: ConfigDict) -> None:
    """Gives a config that takes its model from weights a small model of its own."""
    sizes = {"name": "contrastive", "embed_dim": SMOKE_SIZES["embed_dim"]}
    config.objective = ConfigDict(
        {**sizes, "image": {"variant": "mu/8", "image_size": 16}, "text": {"variant": "mu"}}
    )
    config.tokenizer = ConfigDict({"name": "bytes", "context_length": 16})
    for data in (config.data, *(evaluator.data for evaluator in config.evaluators.values())):
        data.preprocess.resize = {}
    complete(config)


def _shrink_models(section: ConfigDict) -> int | None:
    """Sets `SMOKE_SIZES` in every model of `section`; returns the image size, if there is one."""
    image_size = None
    for key, value in section.items():
        if key == "weight" and isinstance(value, ConfigDict):
            _shrink_weight(value)
        elif isinstance(value, ConfigDict):
            image_size = _shrink_models(value) or image_size
        elif key in SMOKE_SIZES:
            section[key] = SMOKE_SIZES[key]
    if "variant" in section:
        section.update({k: v for k, v in SMOKE_SIZES.items() if k != "embed_dim"})
    if "image_size" in section:
        _, patch_size = split_variant(section.get("variant"), section.get("patch_size"))
        image_size = section.image_size = SMOKE_PATCHES * patch_size
    return image_size


def _shrink_weight(weight: ConfigDict) -> None:
    """Lets a loss with a late begin start at the second of the two steps, and no loss end."""
    late = "begin" in weight
    for key in {"begin", "ramp", "end"} & set(weight):
        del weight[key]
    if late:
        weight.begin = duration(steps=1)


def _smoke_data(data: ConfigDict, split: str, image_size: int | None) -> ConfigDict:
    small = ConfigDict({"source": "tfds", "dataset": "shapes/tiny", "split": split})
    if "preprocess" in data:
        small.preprocess = smoke_preprocess(data.preprocess, image_size)
    return small

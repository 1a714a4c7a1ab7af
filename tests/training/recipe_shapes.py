"""The recipes in configs/ as shapes, with a stand-in for what they would find on disk."""

import math
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp

from vlp_jax import config as config_lib
from vlp_jax.objectives import make_objective
from vlp_jax.training import param_groups

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def load(spec):
    """The config "name" or "name:argument"."""
    name, colon, argument = spec.partition(":")
    return config_lib.load(f"{CONFIGS / name}.py{colon}{argument}")


def objective_of(config, **tokenizer):
    """With a stand-in for the tokenizer, which has as many tokens as it may have."""
    if config.tokenizer:
        ids = {"pad_id": 0, "eos_id": 1, "bos_id": 2, **tokenizer}
        tokenizer = types.SimpleNamespace(
            vocab_size=config.tokenizer.vocab_size,
            context_length=config.tokenizer.context_length,
            **ids,
        )
    return make_objective(config.objective, tokenizer or None)


def shapes_of(config):
    """path -> abstract parameter."""
    objective = objective_of(config)
    spec = {"image": jax.ShapeDtypeStruct((1, *objective.model.image.image_size, 3), jnp.uint8)}
    if config.tokenizer:
        spec["text"] = jax.ShapeDtypeStruct((1, config.tokenizer.context_length), jnp.int32)
    init = jax.eval_shape(lambda key: objective.init(key, spec), jax.random.key(0))
    return param_groups.flatten(nn.unbox(init))


def count(shapes):
    return sum(math.prod(leaf.shape) for leaf in shapes.values())

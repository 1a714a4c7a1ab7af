"""A tiny contrastive setup on in-memory batches, with no input pipeline."""

import types

import jax
import numpy as np
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.objectives.base import Context
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.setup import make_setup
from vlp_jax.training.step import compile_step

TOKENIZER = types.SimpleNamespace(vocab_size=64, context_length=8, pad_id=0, eos_id=2)
BATCH, IMAGE_SIZE = 16, 16


def tiny_config(**objective):
    config = config_lib.base()
    config.batch_size = BATCH
    config.duration = config_lib.duration(steps=20)
    tower = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
    config.objective = ConfigDict(
        {
            "name": "contrastive",
            "loss": "softmax",
            "embed_dim": 16,
            "image": {"variant": "mu/8", "image_size": IMAGE_SIZE, "pooling": "map", **tower},
            "text": {"variant": "mu", **tower},
            **objective,
        }
    )
    return config


def batches(count, size=BATCH, seed=0):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        text = rng.integers(3, TOKENIZER.vocab_size, (size, TOKENIZER.context_length))
        text[:, -1] = TOKENIZER.eos_id
        pixels = rng.integers(0, 256, (size, IMAGE_SIZE, IMAGE_SIZE, 3))
        yield {"image": pixels.astype(np.uint8), "text": text.astype(np.int32)}


_SETUPS = {}  # of all tests of this process: they may use them, and not change them


def setup_on(config, sizes, devices=None):
    """The setup of a config on a mesh, with its programs compiled once for all tests."""
    config = config.copy_and_resolve_references()
    key = (repr(config.to_dict()), repr(sorted(sizes.items())), devices)
    if key not in _SETUPS:
        mesh = mesh_lib.make_mesh(sizes, jax.devices()[: devices or 8])
        spec = {name: (array.shape, array.dtype) for name, array in next(batches(1)).items()}
        _SETUPS[key] = make_setup(config, mesh, TOKENIZER, spec, epoch_examples=64)
    return _SETUPS[key]


def once(setup, name, make):
    """What a setup has made before: a setup is frozen, and `dataclasses.replace` takes no more."""
    if name not in setup.__dict__:
        object.__setattr__(setup, name, make())
    return setup.__dict__[name]


def fresh(setup):
    """The state before step 0, in memory of its own, which a step may take over."""
    values = once(setup, "_fresh", lambda: jax.device_get(setup.fresh_state()))
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract)
    return jax.device_put(values, shardings, may_alias=False)


def gradients(setup, params, batch):
    """Of the loss, past the step, for parameters as they lie."""
    loss = setup.objective.loss
    context = Context(jax.random.key(0))
    make = lambda: jax.jit(jax.grad(lambda p, batch: loss(p, batch, context)[0]))  # noqa: E731
    return once(setup, "_gradients", make)(params, batch)


def compiled(setup):
    return once(
        setup,
        "_compiled",
        lambda: compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh),
    )


def train(setup, count):
    """The state after `count` steps, and the metrics of each."""
    state, step, history = fresh(setup), compiled(setup), []
    for batch in batches(count):
        state, metrics = step(state, put_batch(batch, setup.mesh))
        history.append({name: float(s) / float(c) for name, (s, c) in metrics.items()})
    return state, history

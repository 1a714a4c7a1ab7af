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


def setup_on(config, sizes, devices=None):
    mesh = mesh_lib.make_mesh(sizes, jax.devices()[: devices or 8])
    spec = {name: (array.shape, array.dtype) for name, array in next(batches(1)).items()}
    return make_setup(config, mesh, TOKENIZER, spec, epoch_examples=64)


def fresh(setup):
    return setup.fresh_state()


def gradients(setup, params, batch):
    """Of the loss, past the step, for parameters as they lie."""
    loss = setup.objective.loss
    context = Context(jax.random.key(0))
    return jax.jit(jax.grad(lambda p: loss(p, batch, context)[0]))(params)


def compiled(setup):
    return compile_step(setup.step, setup.abstract, setup.batch_spec, setup.mesh)


def train(setup, count):
    """The state after `count` steps, and the metrics of each."""
    state, step, history = fresh(setup), compiled(setup), []
    for batch in batches(count):
        state, metrics = step(state, put_batch(batch, setup.mesh))
        history.append({name: float(s) / float(c) for name, (s, c) in metrics.items()})
    return state, history

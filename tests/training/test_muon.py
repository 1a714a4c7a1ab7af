"""Muon: which matrices it sees, what it does to them, and where its state lies."""

import helpers
import jax
import numpy as np
import optax
import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.optimizer import MUON_RMS, make_optimizer, matrix_axes


def muon_config(**objective):
    config = helpers.tiny_config(**objective)
    config.optimizer.name = "muon"
    config.optimizer.weight_decay = 0.0
    config.optimizer.clip_norm = 0.0
    return config


def by_path(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def first_updates(config):
    """The first update, gradient and parameters of a tiny model, by path."""
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    params = jax.device_get(helpers.fresh(setup).params)
    batch = next(helpers.batches(1))
    grads = helpers.gradients(setup, params, batch)
    state = jax.jit(setup.optimizer.init)(params)
    updates, _ = jax.jit(setup.optimizer.update)(grads, state, params)
    return setup, by_path(updates), by_path(grads), by_path(params)


# As a matrix: from what a layer takes in to what it gives, one for each of the stacked layers.
WIDTH, PATCH = 32, 8 * 8 * 3
MATRICES = {
    "image/patch_embedding/projection/kernel": (1, PATCH, WIDTH),
    "image/encoder/layers/attention/query/kernel": (2, WIDTH, WIDTH),
    "image/encoder/layers/attention/out/kernel": (2, WIDTH, WIDTH),
    "image/encoder/layers/mlp/up/kernel": (2, WIDTH, 64),
    "image/encoder/layers/mlp/down/kernel": (2, 64, WIDTH),
    "image/pooling/attention/value/kernel": (1, WIDTH, WIDTH),
    "text/encoder/layers/attention/key/kernel": (2, WIDTH, WIDTH),
    "image_projection/kernel": (1, WIDTH, 16),
}


@pytest.fixture(scope="module")
def first():
    return first_updates(muon_config())


@pytest.mark.parametrize("path", MATRICES)
def test_the_update_of_a_matrix_is_nearly_orthogonal(first, path):
    setup, updates, grads, _ = first
    shape = MATRICES[path]
    rate = setup.config.optimizer.muon.learning_rate * float(setup.schedule(0))
    rate /= setup.config.optimizer.learning_rate
    for update, grad in zip(
        np.asarray(updates[path], np.float64).reshape(shape),
        np.asarray(grads[path], np.float64).reshape(shape),
        strict=True,
    ):
        left, values, right = np.linalg.svd(grad, full_matrices=False)
        scale = rate * MUON_RMS * np.sqrt(max(shape[1:]))
        large = values > 0.05 * values[0]  # a gradient that is almost zero in some direction stays
        ours = -np.einsum("ik,ij,kj->k", left, update, right) / scale
        assert large.sum() > 3
        assert (ours[large] > 0.5).all() and (ours[large] < 1.4).all()  # not the gradient's
        assert values[large].max() / values[large].min() > 3
        assert np.linalg.norm(update, 2) < 1.5 * scale


def test_everything_else_is_updated_as_by_adamw(first):
    setup, updates, grads, params = first
    others = [path for path in updates if matrix_axes(path) is None]
    assert {"text/token_embedding/embedding", "logit_scale", "image/pooling/probe"} <= {*others}
    numbers = setup.config.optimizer
    adamw = optax.adamw(setup.schedule, b2=numbers.b2, eps=numbers.eps, weight_decay=0.0)
    pick = {path: params[path] for path in others}
    expected, _ = adamw.update({path: grads[path] for path in others}, adamw.init(pick), pick)
    for path in others:
        np.testing.assert_allclose(updates[path], expected[path], rtol=1e-5, atol=1e-8)


def test_weight_decay_pulls_matrices_and_not_biases(first):
    setup, plain, _, params = first
    config = muon_config()
    config.optimizer.weight_decay = 0.5
    decayed = first_updates(config)[1]
    kernel, bias = "image/encoder/layers/mlp/up/kernel", "image/encoder/layers/mlp/up/bias"
    rate = config.optimizer.muon.learning_rate * float(setup.schedule(0))
    rate /= config.optimizer.learning_rate
    expected = plain[kernel] - rate * 0.5 * params[kernel]
    np.testing.assert_allclose(decayed[kernel], expected, rtol=1e-4, atol=1e-7)
    np.testing.assert_array_equal(decayed[bias], plain[bias])


def test_momentum_lies_as_its_parameter_does():
    setup = helpers.setup_on(muon_config(), {"replica": 2, "fsdp": 2, "tensor": 2})
    params = by_path(setup.abstract.params)
    found = set()
    for path, leaf in by_path(setup.abstract.opt_state).items():
        owner = next((p for p in params if path.endswith(p)), None)
        if owner is not None and leaf.shape == params[owner].shape:
            assert leaf.sharding == params[owner].sharding, path
            found.add(owner)
        else:
            assert leaf.sharding.is_fully_replicated, path
    assert found == set(params)  # every parameter has a momentum
    sharded = [p for p in params.values() if not p.sharding.is_fully_replicated]
    assert len(sharded) > 10


@pytest.mark.slow  # test_meshes.py has AdamW on the same meshes
def test_losses_do_not_depend_on_the_mesh():
    one = helpers.train(helpers.setup_on(muon_config(), {"replica": 1}, 1), 10)[1]
    sizes = {"replica": 2, "fsdp": 2, "tensor": 2}
    many = helpers.train(helpers.setup_on(muon_config(), sizes), 10)[1]
    np.testing.assert_allclose([m["loss"] for m in many], [m["loss"] for m in one], rtol=1e-3)
    assert abs(one[-1]["loss"] - one[0]["loss"]) > 1e-2


def test_learns_what_it_is_shown():
    setup = helpers.setup_on(muon_config(), {"replica": 1}, 1)
    state, step = helpers.fresh(setup), helpers.compiled(setup)
    batch = put_batch(next(helpers.batches(1)), setup.mesh)
    losses = []
    for _ in range(15):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rate", -1.0, "muon.learning_rate is negative"),
        ("momentum", 1.0, r"muon.momentum must be in \[0, 1\)"),
    ],
)
def test_numbers_out_of_range(key, value, message):
    config = muon_config().optimizer
    config.muon[key] = value
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 1}, 1)
    with pytest.raises(UserError, match=message):
        make_optimizer(config, setup.units)

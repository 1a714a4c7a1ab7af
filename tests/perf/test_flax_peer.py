"""The peer out of Flax's own parts computes our loss, and trains: it does the same work."""

import re

import jax
import numpy as np
import pytest

from tests.perf.test_peers import small_setup
from tools.perf.jax_step import fixed_batch
from tools.perf.peers.flax_peer import FlaxModel, FlaxStep, refusal
from vlp_jax.objectives.base import Context
from vlp_jax.parallel import rules

# Our path to that of the peer, whose names Flax gives: the first that fits.
NAMES = (
    (r"(image|text)/encoder/layers/attention/", r"\1/ScanLayer_0/MultiHeadDotProductAttention_0/"),
    (r"(image|text)/encoder/layers/mlp/up/", r"\1/ScanLayer_0/Dense_0/"),
    (r"(image|text)/encoder/layers/mlp/down/", r"\1/ScanLayer_0/Dense_1/"),
    (r"(image|text)/encoder/layers/norm_attention/", r"\1/ScanLayer_0/LayerNorm_0/"),
    (r"(image|text)/encoder/layers/norm_mlp/", r"\1/ScanLayer_0/LayerNorm_1/"),
    (r"(image|text)/position_embedding", r"\1/positions"),
    (r"image/patch_embedding/projection/", "image/Conv_0/"),
    (r"image/pooling/attention/", "image/MultiHeadDotProductAttention_0/"),
    (r"image/pooling/mlp/up/", "image/Dense_0/"),
    (r"image/pooling/mlp/down/", "image/Dense_1/"),
    (r"image/pooling/norm/", "image/LayerNorm_1/"),
    (r"image/pooling/probe", "image/probe"),
    (r"text/token_embedding/", "text/Embed_0/"),
    (r"text/encoder/norm/", "text/LayerNorm_0/"),
    (r"logit_(scale|bias)", r"\1"),
)
BY_CONFIG = {
    "bench_small": (
        (r"image/encoder/norm/", "image/LayerNorm_0/"),
        (r"text_projection/", "Dense_0/"),
    ),
    "clip_b16": (
        (r"image/pre_norm/", "image/LayerNorm_0/"),
        (r"image/encoder/norm/", "image/LayerNorm_1/"),
        (r"image_projection/", "Dense_0/"),
        (r"text_projection/", "Dense_1/"),
    ),
}


def paths(tree):
    return {
        "/".join(str(part.key) for part in path): leaf
        for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }


def to_peer(name, ours, theirs):
    """Our parameters under the names of the peer, and in its shapes."""
    moved = {}
    for path, value in paths(ours).items():
        new = path
        for pattern, by in (*BY_CONFIG[name], *NAMES):
            new, found = re.subn(rf"^{pattern}", by, path)
            if found:
                break
        moved[new.replace("image/", "ImageTower_0/").replace("text/", "TextTower_0/")] = value
    expected = paths(theirs["params"])
    assert moved.keys() == expected.keys()
    leaves = [np.reshape(moved[path], leaf.shape) for path, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(theirs), leaves)


@pytest.mark.parametrize("name", BY_CONFIG)
def test_it_computes_our_loss(name):
    setup = small_setup(name)
    batch = fixed_batch(setup)
    model = FlaxModel.of(setup.objective, setup.config.optimizer)
    state = setup.fresh_state()
    rng = np.random.default_rng(0)  # biases and scales of other values than those that hide them
    ours = jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), state.params)
    theirs, _ = jax.jit(model.init)(batch)
    with rules.use_mesh(setup.mesh):
        context = Context(jax.random.key(0))
        loss = jax.jit(lambda p: setup.objective.loss(p, batch, context)[1].metrics["loss"])
        total, count = loss(ours)
    found = jax.jit(model.loss)(to_peer(name, ours, theirs), batch)
    np.testing.assert_allclose(found, total / count, rtol=2e-5)


def test_it_trains_and_is_timed():
    setup = small_setup("bench_small")
    step = FlaxStep("flax", setup, fixed_batch(setup), ("it differs",))
    before = jax.device_get(step._state[0])
    assert len(step.run(2)) == 2
    changed = jax.tree.map(lambda a, b: bool(np.any(a != b)), before, step._state[0])
    assert all(jax.tree.leaves(changed))
    assert step.notes[-1] == "it differs" and step.facts["devices"] == 1
    ours = sum(leaf.size for leaf in jax.tree.leaves(setup.abstract.params))
    assert step.facts["parameters"] == ours


@pytest.mark.parametrize(
    ("name", "override", "words"),
    [
        ("mae_b16", (), "it trains image with text"),
        ("flip_l16", (), "it sees whole images"),
        ("clip_b16", ("objective.text.qk_norm=True",), "it has no qk_norm"),
        ("clip_b16", ("objective.image.position='sincos'",), "its positions are learned"),
    ],
)
def test_what_it_cannot_do_is_refused(name, override, words):
    assert words in refusal(small_setup(name, override).objective)

"""Losses of the same towers cost one forward pass, and are what they are by themselves."""

import functools
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.objectives import make_objective
from vlp_jax.objectives.base import Context
from vlp_jax.objectives.microbatch import loss_in_parts

TOWER = {"width": 64, "depth": 3, "mlp_dim": 256, "heads": 2}
TOKENIZER = types.SimpleNamespace(vocab_size=64, context_length=8, pad_id=0, eos_id=2)
IMAGE = {"variant": "mu/8", "image_size": 32, "class_token": True, **TOWER}
CLIP = {
    "name": "contrastive",
    "embed_dim": 16,
    "image": {**IMAGE, "pooling": "mean"},
    "text": {"variant": "mu", **TOWER},
}
SIGLIP = {**CLIP, "loss": "sigmoid", "logit_bias_init": -2.0}
CLASSES = {"name": "classification", "classes": 5, "image": {**IMAGE, "pooling": "cls"}}
KEY = jax.random.key(1)


def fields():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (2, 8, 32, 32, 3)).astype(np.uint8)
    text = rng.integers(3, 64, (2, 8, 8)).astype(np.int32)
    text[..., -1] = 2
    return {
        "image": jnp.asarray(image[0]),
        "text": jnp.asarray(text[0]),
        "label": jnp.asarray(rng.integers(0, 5, 8)),
        "more/image": jnp.asarray(image[1]),
        "more/text": jnp.asarray(text[1]),
    }


SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in fields().items()}


def composite(**parts):
    return {"name": "composite", "parts": parts}


def start(section):
    objective = make_objective(section, TOKENIZER)
    return objective, jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), SPEC)))()


def value_and_grad(objective, microbatches=1):
    loss = loss_in_parts(objective, microbatches)
    return jax.jit(jax.value_and_grad(lambda p, b: loss(p, b, Context(KEY))[0]))


def flops(section, microbatches=1):
    return _flops(json.dumps(section), microbatches)


@functools.cache
def _flops(section, microbatches):
    objective, params = start(json.loads(section))
    program = value_and_grad(objective, microbatches).lower(params, fields()).compile()
    return program.cost_analysis()["flops"]


def assert_sum_of(section, microbatches=1):
    """The loss and gradient of a composite are the sums of those of its parts by themselves."""
    objective, params = start(section)
    value, gradient = value_and_grad(objective, microbatches)(params, fields())
    total, summed = 0.0, jax.tree.map(jnp.zeros_like, params)
    for part in objective.parts().values():
        alone, own = value_and_grad(part.objective)(params, part.fields(fields()))
        total += part.weight.value * alone
        summed = jax.tree.map(lambda a, b, w=part.weight.value: a + w * b, summed, own)
    np.testing.assert_allclose(value, total, rtol=1e-5)
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(summed)))
    for one, other in zip(jax.tree.leaves(gradient), jax.tree.leaves(summed), strict=True):
        assert np.abs(one - other).max() <= 1e-5 * size
    assert size > 1e-2


def test_two_contrastive_losses_cost_one_forward_pass():
    one, two = flops(CLIP), flops(composite(clip=CLIP, siglip=SIGLIP))
    print(f"compiled FLOPs of two contrastive losses against one: {two / one:.3f}")
    assert two / one < 1.05
    in_parts = flops(composite(clip=CLIP, siglip=SIGLIP), 2) / flops(CLIP, 2)
    print(f"compiled FLOPs of the same in two microbatches: {in_parts:.3f}")
    assert in_parts < 1.05


def test_losses_that_pool_in_other_ways_share_the_tokens():
    one, two = flops(CLIP), flops(composite(clip=CLIP, classes=CLASSES))
    assert two / one < 1.05
    assert_sum_of(composite(clip=CLIP, classes={**CLASSES, "weight": 2.0}))


@pytest.mark.parametrize("microbatches", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_the_loss_is_the_sum(microbatches):
    assert_sum_of(composite(clip={**CLIP, "weight": 0.5}, siglip=SIGLIP), microbatches)


def test_other_images_are_not_shared():
    more = {**SIGLIP, "data": "more"}
    assert flops(composite(clip=CLIP, siglip=more)) > 1.9 * flops(CLIP)
    assert_sum_of(composite(clip=CLIP, siglip=more), 2)


def test_patches_that_are_hidden_are_not_shared():
    """Each has a mask of its own: they see other tokens."""
    section = composite(clip={**CLIP, "mask_ratio": 0.5}, siglip={**SIGLIP, "mask_ratio": 0.5})
    objective, params = start(section)
    value, _ = value_and_grad(objective)(params, fields())
    total = 0.0
    for index, part in enumerate(objective.parts().values()):
        context = Context(KEY).of_part(index, part)
        loss = jax.jit(lambda p, b, o=part.objective, c=context: o.loss(p, b, c)[0])
        total += loss(params, part.fields(fields()))
    np.testing.assert_allclose(value, total, rtol=1e-5)


def test_uncoupled_losses_of_unequal_counts_in_microbatches():
    """A mean over what counts is one over the whole batch, not a mean of means."""
    from vlp_jax.objectives.classification import Classification

    class Weighted(Classification):
        def forward(self, params, batch, context):
            found = super().forward(params, batch, context)
            count = batch["label"].astype(jnp.float32)  # 0 of some examples
            return {name: (total * count, count) for name, (total, _) in found.items()}

    objective, params = start(CLASSES)
    weighted = Weighted(objective.model)
    assert not weighted.couples_batch
    whole, in_parts = (value_and_grad(weighted, parts)(params, fields()) for parts in (1, 4))
    np.testing.assert_allclose(in_parts[0], whole[0], rtol=1e-5)
    for one, other in zip(*map(jax.tree.leaves, (whole[1], in_parts[1])), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)
    scores = jax.jit(objective.functions()["classify"])(params, fields()["image"])
    losses = -jax.nn.log_softmax(scores)[jnp.arange(8), fields()["label"]]
    expected = np.average(losses, weights=fields()["label"])
    np.testing.assert_allclose(whole[0], expected, rtol=1e-5)

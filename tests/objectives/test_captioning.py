"""Captioning against an oracle, and what of a text counts."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from modules import apply

from vlp_jax.errors import UserError
from vlp_jax.objectives import make_objective
from vlp_jax.objectives.base import Context
from vlp_jax.objectives.microbatch import loss_in_parts

TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
TOKENIZER = types.SimpleNamespace(vocab_size=40, context_length=10, pad_id=0, eos_id=1)
SECTION = {
    "name": "captioning",
    "image": {"variant": "mu/8", "image_size": 16, **TOWER},
    "decoder": {"variant": "mu", **TOWER},
}
KEY, BATCH = jax.random.key(3), 8


def batch():
    rng = np.random.default_rng(0)
    text = rng.integers(2, 40, (BATCH, 10)).astype(np.int32)
    for row, end in enumerate((0, 1, 3, 5, 7, 8, 9, 9)):
        text[row, end], text[row, end + 1 :] = 1, 0
    image = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    return {"image": jnp.asarray(image), "text": jnp.asarray(text)}


SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch().items()}


def start(**more):
    """An objective, and parameters that are far from the zeros of a new head."""
    objective = make_objective({**SECTION, **more}, TOKENIZER)
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), SPEC)))()
    rng = np.random.default_rng(1)
    moved = lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return objective, jax.tree.map(moved, params)


def numpy_loss(objective, params, fields, parallel, smoothing=0.0):
    """The loss of each text in float64, from scores that are computed word by word: a place
    sees the words before it, or none."""
    from vlp_jax.models.attention import AttentionMask

    text, losses, hits = np.asarray(fields["text"]), [], []
    model, variables, image = objective.model, {"params": params}, fields["image"]
    if any(parallel):
        words = jnp.full(text.shape, 40)
        at_once = np.asarray(apply(model, variables, image, words, AttentionMask()), np.float64)
    if not all(parallel):
        one_by_one = np.zeros((*text.shape, 40))
        for place in range(10):
            before = np.zeros_like(text)
            before[:, 1 : place + 1] = text[:, :place]
            scores = apply(model, variables, image, jnp.asarray(before))
            one_by_one[:, place] = scores[:, place]
    for row, tokens in enumerate(text):
        end = int(np.flatnonzero(tokens == 1)[0]) + 1
        scores = (at_once if parallel[row] else one_by_one)[row, :end]
        log = scores - np.log(np.exp(scores).sum(-1, keepdims=True))
        own = -log[np.arange(end), tokens[:end]]
        losses.append((1 - smoothing) * own - smoothing * log.mean(-1))
        hits.append(log.argmax(-1) == tokens[:end])
    return losses, hits


@pytest.mark.parametrize("share", [0.0, 1.0, 0.5])
def test_it_is_the_loss_of_words_one_after_the_other_or_all_at_once(share):
    objective, params = start(parallel_share=share, label_smoothing=0.1)
    fields, context = batch(), Context(KEY)
    drawn = objective.draw(fields, context)
    parallel = np.asarray(drawn["parallel"])
    assert parallel.sum() == {0.0: 0, 1.0: BATCH}.get(share, parallel.sum())
    assert share in (0.0, 1.0) or 0 < parallel.sum() < BATCH
    value, output = jax.jit(lambda p, b: objective.loss(p, b, context))(params, fields)
    losses, hits = numpy_loss(objective, params, fields, parallel, 0.1)
    means = np.array([own.mean() for own in losses])
    np.testing.assert_allclose(value, means.mean(), rtol=1e-5)
    metrics = {name: float(a / b) for name, (a, b) in output.metrics.items()}
    assert metrics["accuracy"] == pytest.approx(np.concatenate(hits).mean())
    if share == 0.5:
        assert metrics["parallel_loss"] == pytest.approx(means[parallel].mean(), rel=1e-5)
        assert metrics["causal_loss"] == pytest.approx(means[~parallel].mean(), rel=1e-5)


def test_evaluation_tells_all_words_but_those_before_and_does_not_smooth():
    objective, params = start(label_smoothing=0.3, mean="token")
    context = Context(KEY, train=False)
    value, _ = jax.jit(lambda p, b: objective.loss(p, b, context))(params, batch())
    losses, _ = numpy_loss(objective, params, batch(), np.zeros(BATCH, bool))
    np.testing.assert_allclose(value, np.concatenate(losses).mean(), rtol=1e-5)


def test_what_is_behind_the_end_of_a_text_changes_nothing():
    """Neither the loss nor a gradient, whether it is padding or not."""
    objective, params = start(parallel_share=0.0)
    fields = batch()
    rng, text = np.random.default_rng(5), np.array(fields["text"])
    behind = np.cumsum(text == 1, axis=1) - (text == 1) > 0
    text[behind] = rng.integers(0, 40, behind.sum())
    loss = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, b, Context(KEY))[0]))
    one, other = loss(params, fields), loss(params, {**fields, "text": jnp.asarray(text)})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), one, other)


def test_an_example_without_a_text_has_no_weight():
    objective, params = start(parallel_share=0.0)
    fields = batch()
    fields["text"] = fields["text"].at[2].set(0)
    value, output = jax.jit(lambda p, b: objective.loss(p, b, Context(KEY)))(params, fields)
    losses, _ = numpy_loss(objective, params, batch(), np.zeros(BATCH, bool))
    np.testing.assert_allclose(
        value, np.mean([own.mean() for row, own in enumerate(losses) if row != 2]), rtol=1e-5
    )
    assert float(output.metrics["loss"][1]) == BATCH - 1


@pytest.mark.parametrize("mean", ["example", pytest.param("token", marks=pytest.mark.slow)])
def test_microbatches_equal_the_whole_batch(mean):
    objective, params = start(mean=mean)
    found = [
        jax.jit(jax.value_and_grad(lambda p, f=f: f(p, batch(), Context(KEY))[0]))(params)
        for f in (loss_in_parts(objective, parts) for parts in (1, 4))
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    leaves = [jax.tree.leaves(gradient) for _, gradient in found]
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves[0]))
    for one, other in zip(*leaves, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * size


def test_coca_is_a_sum_that_looks_once():
    """Contrast and captions of one image tower: its forward pass is shared."""
    image = {**SECTION["image"], "pooling": "mean"}
    contrast = {
        "name": "contrastive",
        "embed_dim": 16,
        "image": image,
        "text": {"variant": "mu", **TOWER},
    }
    captions = {**SECTION, "parallel_share": 0.0, "mean": "token", "weight": 2.0}
    parts = {"contrast": contrast, "captions": captions}
    objective = make_objective({"name": "composite", "parts": parts}, TOKENIZER)
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), SPEC)))()
    assert {"image", "text", "decoder", "logit_scale"} <= params.keys()
    alone = {name: part.objective for name, part in objective.parts().items()}
    loss = lambda one: jax.jit(lambda p, b: one.loss(p, b, Context(KEY)))(params, batch())  # noqa: E731
    value, output = loss(objective)
    own = {name: loss(one)[0] for name, one in alone.items()}
    np.testing.assert_allclose(value, own["contrast"] + 2 * own["captions"], rtol=1e-5)
    assert {"contrast/batch_accuracy", "captions/accuracy"} <= output.metrics.keys()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"parallel_share": 1.5}, "parallel_share must be in"),
        ({"mean": "median"}, "known: example, token"),
        ({"label_smoothing": 1.0}, "label_smoothing"),
        ({"attention": "cudnn"}, "'cudnn' holds no mask with prefix .*take attention 'xla'"),
        ({"decoder": {**SECTION["decoder"], "attention": "pallas"}}, "'pallas' holds no mask"),
        ({"decoder": {**SECTION["decoder"], "heads": 5}}, "5 heads do not divide"),
    ],
)
def test_bad_sections(more, message):
    with pytest.raises(UserError, match=message):
        make_objective({**SECTION, **more}, TOKENIZER)
    with pytest.raises(UserError, match=r"needs config\.tokenizer"):
        make_objective(SECTION, None)

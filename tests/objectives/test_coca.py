"""CoCa as an objective: two losses of one model, its captions, and bad sections."""

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
from vlp_jax.objectives.flops import count_flops
from vlp_jax.objectives.microbatch import loss_in_parts

TOWER = {"width": 32, "depth": 2, "mlp_dim": 64, "heads": 2}
TOKENIZER = types.SimpleNamespace(vocab_size=40, context_length=9, pad_id=0, eos_id=1, bos_id=2)
SECTION = {
    "name": "coca",
    "image": {"variant": "mu/8", "image_size": 16, **TOWER, "depth": 4},
    "text": {"variant": "mu", **TOWER, "depth": 3},
    "decoder": {"variant": "mu", **TOWER},
    "embed_dim": 24,
    "queries": 5,
    "pooler_heads": 3,
}
KEY, BATCH = jax.random.key(3), 8


def batch():
    rng = np.random.default_rng(0)
    text = rng.integers(3, 40, (BATCH, 9)).astype(np.int32)
    text[:, 0] = 2
    for row, end in enumerate((1, 2, 3, 5, 7, 8, 8, 8)):
        text[row, end], text[row, end + 1 :] = 1, 0
    text[7, 8] = 5  # cut: it has no end
    image = rng.integers(0, 256, (BATCH, 16, 16, 3)).astype(np.uint8)
    return {"image": jnp.asarray(image), "text": jnp.asarray(text)}


SPEC = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch().items()}


def start(**more):
    """An objective, and parameters of which none is zero or one."""
    objective = make_objective({**SECTION, **more}, TOKENIZER)
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), SPEC)))()
    rng = np.random.default_rng(1)
    moved = lambda x: (x + 0.1 * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return objective, jax.tree.map(moved, params)


@pytest.fixture(scope="module")
def made():
    return start()


def looked(model, params, image):
    return jax.jit(lambda p, x: model.apply({"params": p}, x, method="look"))(params, image)


def test_the_loss_is_the_weighted_sum_of_both(made):
    objective, params = made
    value, output = jax.jit(lambda p, b: objective.loss(p, b, Context(KEY)))(params, batch())
    found = {name: float(a / b) for name, (a, b) in output.metrics.items()}
    wanted = found["contrast/loss"] + 2 * found["caption/loss"]
    np.testing.assert_allclose(value, wanted, rtol=1e-6)

    # The mean over the tokens behind the first up to the end, each from those before it alone.
    caption, text = objective.parts()["caption"].objective, np.asarray(batch()["text"])
    seen = looked(caption.model, params, batch()["image"])
    score = jax.jit(
        lambda p, tokens, seen: caption.model.apply(
            {"params": p}, tokens, seen, method="score_tokens"
        )
    )
    losses = []
    for place in range(1, 9):
        before = np.where(np.arange(9) < place, text, 7)
        log = jax.nn.log_softmax(score(params, jnp.asarray(before), seen)[:, place - 1])
        rows = text[:, place] != 0
        losses += list(-np.asarray(log)[np.arange(BATCH), text[:, place]][rows])
    assert len(losses) == (text[:, 1:] != 0).sum()
    np.testing.assert_allclose(found["caption/loss"], np.mean(losses), rtol=1e-5)


def flops(objective, params):
    step = jax.jit(jax.value_and_grad(lambda p, b: objective.loss(p, b, Context(KEY))[0]))
    return step.lower(params, batch()).compile().cost_analysis()["flops"]


def test_both_losses_cost_one_pass_of_each_tower(made):
    objective, params = made
    alone = {name: part.objective for name, part in objective.parts().items()}
    one, both = flops(alone["caption"], params), flops(objective, params)
    print(f"compiled FLOPs of both losses over the captions' alone: {both / one:.3f}")
    assert both / one < 1.06
    counted = {
        name: count_flops(lambda p, o=one: o.loss(p, batch(), Context(KEY))[0], params).total
        for name, one in {**alone, "sum": objective}.items()
    }
    print("FLOPs of the forward pass", counted)
    assert counted["sum"] < 1.06 * counted["caption"]
    assert counted["contrast"] + counted["caption"] > 1.3 * counted["sum"]


def test_microbatches_equal_the_whole_batch(made):
    objective, params = made
    found = [
        jax.jit(jax.value_and_grad(lambda p, f=f: f(p, batch(), Context(KEY))[0]))(params)
        for f in (loss_in_parts(objective, parts) for parts in (1, 4))
    ]
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    leaves = [jax.tree.leaves(gradient) for _, gradient in found]
    size = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves[0]))
    for one, other in zip(*leaves, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * size


@pytest.mark.parametrize(
    ("prompt", "scan"),
    [
        ((), True),
        ((5, 9), False),
        pytest.param((), False, marks=pytest.mark.slow),
        pytest.param((5, 9), True, marks=pytest.mark.slow),
    ],
)
def test_captions_by_a_cache_are_those_without(prompt, scan):
    objective, params = start(scan_layers=scan)
    caption = objective.parts()["caption"].objective
    image = batch()["image"]
    made = jax.jit(lambda p, x: caption.caption(p, x, prompt=prompt))(params, image)
    seen = looked(caption.model, params, image)
    score = jax.jit(
        lambda p, tokens: caption.model.apply({"params": p}, tokens, seen, method="score_tokens")
    )
    text = np.zeros((BATCH, 9), np.int32)
    first = 1 + len(prompt)
    text[:, :first] = (2, *prompt)
    total, done = np.zeros(BATCH), np.zeros(BATCH, bool)
    for place in range(first, 9):
        log = np.asarray(jax.nn.log_softmax(score(params, jnp.asarray(text))[:, place - 1]))
        best = log.argmax(-1)
        total += np.where(done, 0, log.max(-1))
        text[:, place] = np.where(done, 0, best)
        done |= best == 1
    np.testing.assert_array_equal(made.tokens, text[:, first:])
    np.testing.assert_allclose(made.scores, total, rtol=1e-5)


def test_beams_find_texts_that_are_at_least_as_likely(made):
    objective, params = made
    caption, image = objective.functions()["caption"].call, batch()["image"]
    greedy, beams = (
        jax.jit(lambda p, x, n=n: caption(p, x, length=4, beams=n))(params, image) for n in (1, 3)
    )
    assert (np.asarray(beams.scores) >= np.asarray(greedy.scores) - 1e-4).mean() >= 0.75
    # The score of a text is what the model gives it in one pass.
    ended = np.asarray(beams.tokens)
    text = np.zeros((BATCH, 9), np.int32)
    text[:, 0], text[:, 1:5] = 2, ended
    seen = looked(objective.model, params, image)
    scores = jax.jit(
        lambda *x: objective.model.apply({"params": params}, *x, method="score_tokens")
    )
    log = jax.nn.log_softmax(scores(jnp.asarray(text), seen))
    own = np.take_along_axis(np.asarray(log)[:, :4], ended[..., None], axis=2)[..., 0]
    before = np.cumsum(ended == 1, axis=1) - (ended == 1)
    np.testing.assert_allclose(beams.scores, (own * (before == 0)).sum(1), rtol=1e-4)


def test_the_likelihood_of_classes_is_the_captions_loss(made):
    objective, params = made
    caption, fields = objective.parts()["caption"].objective, batch()
    inputs = {"image": fields["image"], "classes": fields["text"]}
    found = jax.jit(caption.class_likelihood)(params, inputs)
    context = Context(KEY, train=False)
    forward = jax.jit(lambda p, b: caption.forward(p, caption.draw(b, context), context))
    losses = forward(params, fields)["loss"][0]
    np.testing.assert_allclose(np.diag(found), -losses, rtol=1e-5)


def test_embeddings_are_the_contrastive_parts(made):
    objective, params = made
    functions, fields = objective.functions(), batch()
    vectors = jax.jit(functions["embed_image"])(params, fields["image"])
    out = apply(objective.model, {"params": params}, fields["image"], fields["text"])
    np.testing.assert_allclose(vectors, out["image"], atol=1e-6)
    features = jax.eval_shape(functions["image_features"], params, fields["image"])
    assert features.shape == (BATCH, 24)
    np.testing.assert_allclose(np.linalg.norm(out["text"], axis=-1), 1, rtol=1e-5)


def test_remat_and_a_narrow_type_change_no_shape():
    objective, params = start(remat="dots", dtype="bfloat16")
    plain, _ = start()
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, batch(), Context(KEY))[0]))(params)
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
    values = [
        jax.jit(lambda p, b, o=o: o.loss(p, b, Context(KEY))[0])(params, batch())
        for o in (objective, plain)
    ]
    np.testing.assert_allclose(*values, rtol=0.05)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"loss_form": "ring"}, "known: plain, blocked"),
        ({"queries": 1}, "queries must be at least 2, not 1"),
        ({"pooler_heads": 5}, "5 pooler_heads do not divide 24"),
        ({"caption_weight": 0.0}, "a weight must be positive"),
        ({"attention": "xla_padded"}, "holds no mask with explicit .*take attention 'xla'"),
        ({"decoder": {**SECTION["decoder"], "width": 64}}, "one width, not 64 and 32"),
        ({"logit_scale_init": 0.0}, "logit_scale_init must be > 0"),
        ({"text": {**SECTION["text"], "pooling": "eos"}}, "pooling"),
    ],
)
def test_bad_sections(more, message):
    with pytest.raises(UserError, match=message):
        make_objective({**SECTION, **more}, TOKENIZER)


def test_a_tokenizer_with_bos_is_needed():
    without = types.SimpleNamespace(**{**vars(TOKENIZER), "bos_id": None})
    for tokenizer, message in ((None, r"needs config\.tokenizer"), (without, "with a bos")):
        with pytest.raises(UserError, match=message):
            make_objective(SECTION, tokenizer)

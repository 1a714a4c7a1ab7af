"""The blocked losses against the plain ones, a float64 oracle, and what they promise of memory."""

import functools
import re

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vlp_jax.objectives.base import Context
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.objectives.contrastive import make_contrastive
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES, pair_logits
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.parallel.batch import put_batch

NAMES = tuple(PAIRWISE_LOSSES)
ARGUMENTS = (0, 1, 2, 3)
BATCH, DIM = 40, 12
MESHES = {
    "1": ({}, 1),
    "2": ({"replica": 2}, 2),
    "2 fsdp": ({"fsdp": 2}, 2),
    "8": ({"replica": 8}, 8),
    "4x2": ({"replica": 4, "fsdp": 2}, 8),
    "2x4": ({"replica": 2, "fsdp": 4}, 8),
    "2x2x2": ({"replica": 2, "fsdp": 2, "tensor": 2}, 8),
}


def make_mesh(name):
    sizes, devices = MESHES[name]
    return mesh_lib.make_mesh(sizes, jax.devices()[:devices])


def make_pairs(batch=BATCH, dim=DIM, seed=0):
    """Embeddings of which about half find their partner, scale and bias, float64."""
    rng = np.random.default_rng(seed)
    image, noise = rng.normal(size=(2, batch, dim))
    text = image + rng.uniform(0, 3, size=(batch, 1)) * noise
    image, text = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    return image, text, np.float64(14.3), np.float64(-2.5)


def as_arrays(pairs, dtype=jnp.float32):
    return [jnp.asarray(x, dtype) for x in pairs]


def plain(name):
    """The results of `blocked_loss`, by way of all logits at once."""

    def loss(*arguments):
        logits = pair_logits(*arguments)
        hits = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
        return PAIRWISE_LOSSES[name](logits), hits.sum().astype(jnp.float32)

    return loss


def blocked(name, mesh, size=1024):
    return lambda *arguments: blocked_loss(name, *arguments, mesh=mesh, block_size=size)


def value_and_gradients(function, arguments):
    return jax.jit(jax.value_and_grad(function, ARGUMENTS, has_aux=True))(*arguments)


def assert_equal(ours, expected, tolerance=1e-5):
    """Loss, hits and gradients; each gradient by its norm. The bias moves no softmax: zero."""
    (loss, hits), gradients = ours
    (expected_loss, expected_hits), expected_gradients = expected
    np.testing.assert_allclose(loss, expected_loss, rtol=tolerance)
    assert hits == expected_hits
    for ours, theirs in zip(gradients, expected_gradients, strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(x, np.float64) for x in (ours, theirs))
        error = np.linalg.norm(ours - theirs)
        assert error <= tolerance * max(np.linalg.norm(theirs), 1e-2)


@pytest.fixture(scope="module", params=NAMES)
def reference(request):
    arguments = as_arrays(make_pairs())
    return request.param, arguments, value_and_gradients(plain(request.param), arguments)


def test_the_pairs_show_what_they_should(reference):
    _, _, ((loss, hits), gradients) = reference
    assert 0.2 * BATCH < hits < 0.8 * BATCH and loss > 0.1
    assert all(np.linalg.norm(gradient) > 1e-3 for gradient in gradients[:3])


@pytest.mark.parametrize("mesh", MESHES)
def test_equals_the_plain_form_on_every_mesh(reference, mesh):
    name, arguments, expected = reference
    mesh = make_mesh(mesh)
    assert_equal(value_and_gradients(blocked(name, mesh), arguments), expected)


# A part of the batch is 40 on one device, 20 on two and 5 on eight.
@pytest.mark.parametrize("mesh, size", [("8", 1), ("8", 2), ("8", 5), ("2", 7), ("1", 16)])
def test_equals_the_plain_form_in_blocks_of_every_size(reference, mesh, size):
    name, arguments, expected = reference
    assert_equal(value_and_gradients(blocked(name, make_mesh(mesh), size), arguments), expected)


def test_the_value_alone_equals_that_with_gradients(reference):
    name, arguments, (expected, _) = reference
    loss, hits = jax.jit(blocked(name, make_mesh("2x2x2")))(*arguments)
    np.testing.assert_allclose(loss, expected[0], rtol=1e-5)
    assert hits == expected[1]


def test_the_cotangent_reaches_all_gradients_and_hits_have_none(reference):
    name, arguments, (_, expected) = reference

    def function(*arguments):
        loss, hits = blocked(name, make_mesh("2"))(*arguments)
        return -3 * loss + 100 * hits

    ours = jax.jit(jax.grad(function, ARGUMENTS))(*arguments)
    for gradient, one in zip(ours, expected, strict=True):
        np.testing.assert_allclose(gradient, -3 * one, rtol=1e-4, atol=1e-6)


def oracle(name, image, text, scale, bias):
    """Loss and gradients by the definitions, in NumPy's float64."""
    logits = scale * image @ text.T + bias
    count, own = len(logits), np.eye(len(logits))
    if name == "softmax":
        e = np.exp(logits)
        rows, columns = e.sum(1, keepdims=True), e.sum(0, keepdims=True)
        loss = (np.log(rows).mean() + np.log(columns).mean()) / 2 - np.diag(logits).mean()
        slope = (e / rows / 2 + e / columns / 2 - own) / count
    else:
        loss = np.log1p(np.exp((1 - 2 * own) * logits)).sum() / count
        slope = (1 / (1 + np.exp(-logits)) - own) / count
    dots = image @ text.T
    return loss, (
        scale * slope @ text,
        scale * slope.T @ image,
        (slope * dots).sum(),
        slope.sum(),
    )


@pytest.mark.parametrize("name", NAMES)
def test_float64_equals_the_oracle_and_finite_differences(name):
    pairs = make_pairs()
    with jax.enable_x64(True):
        arguments = as_arrays(pairs, jnp.float64)
        function = blocked(name, make_mesh("4x2"), 3)
        (loss, _), gradients = value_and_gradients(function, arguments)
        expected, expected_gradients = oracle(name, *pairs)
        assert loss.dtype == jnp.float64
        np.testing.assert_allclose(loss, expected, rtol=1e-12)
        for gradient, one in zip(gradients, expected_gradients, strict=True):
            assert gradient.dtype == jnp.float64
            np.testing.assert_allclose(gradient, one, rtol=1e-10, atol=1e-13)
        value, rng = jax.jit(function), np.random.default_rng(0)
        for index, gradient in enumerate(gradients):
            direction = rng.normal(size=np.shape(gradient))
            ends = []
            for by in (1e-6, -1e-6):
                moved = list(arguments)
                moved[index] = moved[index] + by * direction
                ends.append(float(value(*moved)[0]))
            numeric = (ends[0] - ends[1]) / 2e-6
            np.testing.assert_allclose(np.sum(gradient * direction), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", NAMES)
def test_large_logits_stay_finite(name):
    image, text, _, bias = as_arrays(make_pairs())
    arguments = [image, text, jnp.float32(1e4), bias]
    ours = value_and_gradients(blocked(name, make_mesh("8"), 2), arguments)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(ours))
    assert_equal(ours, value_and_gradients(plain(name), arguments), tolerance=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_permuting_the_pairs_permutes_the_gradients(name):
    image, text, scale, bias = as_arrays(make_pairs())
    order = np.random.default_rng(1).permutation(BATCH)
    function = blocked(name, make_mesh("8"), 2)
    ours = value_and_gradients(function, (image[order], text[order], scale, bias))
    (value, (to_image, to_text, *rest)) = value_and_gradients(function, (image, text, scale, bias))
    assert_equal(ours, (value, (to_image[order], to_text[order], *rest)))


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_embeddings_are_computed_with_in_float32(name):
    image, text, scale, bias = as_arrays(make_pairs())
    image, text = image.astype(jnp.bfloat16), text.astype(jnp.bfloat16)
    arguments = (image, text, scale, bias)
    mesh = make_mesh("2")
    (loss, hits), gradients = value_and_gradients(blocked(name, mesh), arguments)
    (expected, expected_hits), wide = value_and_gradients(
        plain(name), (image.astype(jnp.float32), text.astype(jnp.float32), scale, bias)
    )
    assert loss.dtype == jnp.float32 and gradients[0].dtype == gradients[1].dtype == jnp.bfloat16
    np.testing.assert_allclose(loss, expected, rtol=1e-5)  # bfloat16 sums would be 1e-3 off
    assert hits == expected_hits
    for gradient, one in zip(gradients[:2], wide[:2], strict=True):
        np.testing.assert_allclose(gradient.astype(jnp.float32), one, rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(gradients[2], wide[2], rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", ["1", "2", "8"])
def test_of_equal_logits_the_first_is_the_hit(name, mesh):
    """Powers of two, so that equal logits are equal to the last bit."""
    text = np.eye(8)[[0, 0, 1, 2, 3, 3, 1, 4, 5, 6, 7, 7, 7, 2, 0, 6]]
    image, best = text.copy(), np.argmax(text @ text.T, axis=1)
    # All logits of this row are equal: the first text is the best. It was the first of two with
    # their text, so that a rule by which the last counts would have one hit more.
    image[3] = best[3] = 0
    arguments = as_arrays((image, text, 2.0, -1.0))
    assert (np.argmax(pair_logits(*arguments), axis=1) == best).all()
    expected = (best == np.arange(16)).sum()
    assert 0 < expected < 16
    for size in (1, 3, 1024):
        assert jax.jit(blocked(name, make_mesh(mesh), size))(*arguments)[1] == expected


def test_a_row_with_a_nan_is_no_hit():
    image, text, scale, bias = as_arrays((np.eye(8), np.eye(8), 1.0, 0.0))
    function = jax.jit(blocked("sigmoid", make_mesh("8")))
    assert function(image, text, scale, bias)[1] == 8
    assert function(image.at[2].set(jnp.nan), text, scale, bias)[1] == 7
    assert function(image, text.at[7].set(jnp.nan), scale, bias)[1] == 0


def compiled_text(name, mesh):
    spread, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    embedding = jax.ShapeDtypeStruct((BATCH, DIM), jnp.float32, sharding=spread)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)

    def text_of(function):
        step = jax.jit(
            jax.value_and_grad(function, ARGUMENTS, has_aux=True),
            out_shardings=((whole, whole), (spread, spread, whole, whole)),
        )
        with rules.use_mesh(mesh):
            return step.lower(embedding, embedding, scalar, scalar).compile().as_text()

    return text_of(blocked(name, mesh)), text_of(plain(name))


@pytest.mark.parametrize("mesh", ["8", "2x2x2"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_travel_and_are_never_gathered(name, mesh):
    ours, theirs = compiled_text(name, make_mesh(mesh))
    gather, travel = (
        re.compile(rf"= .* {op}(-start)?\(") for op in ("all-gather", "collective-permute")
    )
    assert gather.search(theirs)  # so that the pattern finds what it should
    assert not gather.search(ours)
    assert travel.search(ours)
    # Nothing has the size of the batch on a side.
    assert re.search(rf"f32\[{BATCH}[,\]]", theirs) and not re.search(rf"f32\[{BATCH}[,\]]", ours)


def train(config, mesh):
    """The metrics of five steps, and whether the compiled step has a `ppermute` of ours in it.

    The partitioner may move parameters by permutes of its own, which do not bear that name.
    """
    setup = helpers.setup_on(config, *MESHES[mesh])
    state, step, history = helpers.fresh(setup), helpers.compiled(setup), []
    for batch in helpers.batches(5):
        state, metrics = step(state, put_batch(batch, setup.mesh))
        history.append({name: float(s) / float(c) for name, (s, c) in metrics.items()})
    return history, "/ppermute" in step.program.as_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "loss, mesh, optimizer", [("softmax", "2x2x2", "adamw"), ("sigmoid", "2 fsdp", "muon")]
)
def test_training_steps_equal_those_of_the_plain_form(loss, mesh, optimizer):
    config = helpers.tiny_config(loss=loss)
    config.optimizer.name = optimizer
    expected, has_ring = train(config, mesh)
    assert not has_ring
    config.objective.loss_form, config.objective.loss_block_size = "blocked", 3
    ours, has_ring = train(config, mesh)
    assert has_ring
    for name in ("loss", "batch_accuracy", "grad_norm", "logit_scale"):
        np.testing.assert_allclose(
            [metrics[name] for metrics in ours],
            [metrics[name] for metrics in expected],
            rtol=1e-4,
        )
    assert abs(expected[-1]["loss"] - expected[0]["loss"]) > 1e-3


def test_a_blocked_loss_without_a_mesh_says_so():
    setup = helpers.setup_on(helpers.tiny_config(loss_form="blocked"), {}, 1)

    def trace():
        rng = jax.random.key(0)
        return jax.eval_shape(
            lambda params, batch: setup.objective.loss(params, batch, Context(rng)),
            setup.abstract.params,
            setup.batch_spec,
        )

    with pytest.raises(ValueError, match=r"needs a mesh.*use_mesh"):
        trace()
    with rules.use_mesh(setup.mesh):
        assert trace()[0].shape == ()


@pytest.mark.parametrize(
    "wrong, words",
    [
        ({"loss_form": "chunked"}, "known: plain, blocked"),
        ({"loss_block_size": 0}, "at least 1"),
        ({"logit_scale_init": 0.0}, "logit_scale_init must be > 0, not 0.0"),
        ({"max_logit_scale": -1.0}, "max_logit_scale must be >= 0"),
    ],
)
def test_contrastive_refuses_what_it_does_not_know(wrong, words):
    config = helpers.tiny_config()
    towers = {"image": config.objective.image, "text": config.objective.text}
    with pytest.raises(ValueError, match=words):
        make_contrastive(tokenizer=helpers.TOKENIZER, embed_dim=16, **towers, **wrong)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"name": "hinge"}, "known: softmax, sigmoid"),
        ({"text": jnp.zeros((BATCH, DIM + 1))}, "of pairs"),
        ({"block_size": 0}, "at least 1"),
        ({"image": jnp.zeros((12, DIM)), "text": jnp.zeros((12, DIM))}, "not divisible by the 8"),
        ({"mesh": jax.sharding.AbstractMesh((8,), ("data",))}, "no axis replica, fsdp"),
    ],
)
def test_blocked_loss_refuses_what_does_not_fit(change, words):
    image, text, scale, bias = as_arrays(make_pairs())
    arguments = {"name": "softmax", "image": image, "text": text, "scale": scale, "bias": bias}
    with pytest.raises(ValueError, match=words):
        blocked_loss(**{**arguments, "mesh": make_mesh("8"), **change})


def temporary_bytes(loss, mesh, batch, dim):
    """Of a device, for the loss with its gradients, which stay where their embeddings are."""
    spread, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    embedding = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=spread)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True),
        out_shardings=((whole, whole), (spread, spread, whole, whole)),
    )
    with rules.use_mesh(mesh):
        program = step.lower(embedding, embedding, scalar, scalar).compile()
    return program.memory_analysis().temp_size_in_bytes


def replicas(count):
    return mesh_lib.make_mesh({"replica": count}, jax.devices()[:count])


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_memory_of_the_blocked_form_does_not_grow_with_the_devices(name):
    def growth(form):
        few, many = (temporary_bytes(form(replicas(n)), replicas(n), 64 * n, 32) for n in (4, 8))
        return many / few

    def blocked(mesh):
        return functools.partial(blocked_loss, name, mesh=mesh, block_size=16)

    # The plain form holds the logits of its images with all texts, twice as many on twice the
    # devices. A ring of two devices is a program of its own, so that four are compared with eight.
    assert growth(lambda mesh: plain(name)) > 1.9 and growth(blocked) < 1.1


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_in_blocks_memory_follows_the_part_of_the_batch_and_not_its_square(name):
    mesh = replicas(2)

    def temporary(part, block_size):
        loss = functools.partial(blocked_loss, name, mesh=mesh, block_size=block_size)
        return temporary_bytes(loss, mesh, 2 * part, 8)

    assert temporary(1024, 64) < 2.2 * temporary(512, 64)
    assert temporary(1024, 1024) > 3 * temporary(512, 512)

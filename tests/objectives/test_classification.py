"""Classification and question answering: losses against torch, fine-tuning, what models look at."""

import types

import closed_forms
import flax.linen as nn
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlp_jax import config as config_lib
from vlp_jax.data.batch_ops import MixUp
from vlp_jax.errors import UserError
from vlp_jax.models.values import Pixels
from vlp_jax.objectives import make_objective
from vlp_jax.objectives.base import Context, check_reads
from vlp_jax.objectives.classification import class_losses
from vlp_jax.objectives.microbatch import loss_in_parts
from vlp_jax.training import param_groups

TOWER = {"width": 16, "depth": 2, "mlp_dim": 32, "heads": 2}
TOKENIZER = types.SimpleNamespace(vocab_size=32, context_length=6, pad_id=0, eos_id=2)
SIZE, BATCH, CLASSES = 16, 8, 5
IMAGE = {"variant": "mu/8", "image_size": SIZE, "pooling": "mean", **TOWER}
CLASSIFICATION = {"name": "classification", "image": IMAGE, "classes": CLASSES}
QUESTIONS = {
    "name": "question_answering",
    "image": IMAGE,
    "text": {"variant": "mu", "causal": False, "padding_mask": True, **TOWER},
    "fusion": {**TOWER, "depth": 1},
    "answers": CLASSES,
}
KEY = jax.random.key(3)


def batch(seed=0):
    rng = np.random.default_rng(seed)
    text = rng.integers(3, 32, (BATCH, 6))
    text[:, 4:] = 0  # padding
    labels = rng.integers(0, CLASSES, BATCH).astype(np.int32)
    return {
        "image": rng.integers(0, 256, (BATCH, SIZE, SIZE, 3)).astype(np.uint8),
        "text": text.astype(np.int32),
        "label": labels,
        "answer": labels[::-1].copy(),
    }


def spec_of(fields):
    return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in fields.items()}


def start(section):
    """An objective and parameters that are far from the zeros of a new head."""
    objective = make_objective(section, TOKENIZER)
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), spec_of(batch()))))()
    kernel = np.random.default_rng(3).normal(size=params["head"]["kernel"].shape)
    params["head"]["kernel"] = jnp.asarray(kernel, jnp.float32)
    return objective, params


def loss_of(objective, train=True):
    """Compiled: operations one by one would each be compiled by itself."""
    return jax.jit(lambda params, fields: objective.loss(params, fields, Context(KEY, train=train)))


@pytest.fixture(scope="module")
def answering():
    objective, params = start(QUESTIONS)
    answer = jax.jit(objective.functions()["answer"])
    return types.SimpleNamespace(objective=objective, params=params, answer=answer)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_those_of_torch(smoothing):
    rng = np.random.default_rng(0)
    scores, labels = rng.normal(size=(6, CLASSES)) * 3, rng.integers(0, CLASSES, 6)
    shares = rng.dirichlet(np.ones(CLASSES), 6)
    x = torch.tensor(scores)
    for targets in (labels, shares):
        given = jnp.asarray(targets, jnp.int32 if targets is labels else jnp.float32)
        own = class_losses(jnp.asarray(scores, jnp.float32), given, "softmax", smoothing)
        expected = torch.nn.functional.cross_entropy(
            x, torch.tensor(targets), reduction="none", label_smoothing=smoothing
        )
        np.testing.assert_allclose(own, expected, rtol=1e-5)
        full = np.eye(CLASSES)[labels] if targets is labels else shares
        full = (1 - smoothing) * full + smoothing / CLASSES
        own = class_losses(jnp.asarray(scores, jnp.float32), given, "sigmoid", smoothing)
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            x, torch.tensor(full), reduction="none"
        ).sum(1)
        np.testing.assert_allclose(own, expected, rtol=1e-5)


def test_a_class_that_is_not_there_is_no_zero_loss():
    losses = class_losses(jnp.zeros((3, CLASSES)), jnp.asarray([0, CLASSES, -1]), "softmax")
    assert np.isnan(losses).tolist() == [False, True, True]


def test_labels_of_mixup_and_smoothing_in_training_alone():
    objective, params = start({**CLASSIFICATION, "label_smoothing": 0.2})
    hard = batch()
    seeds = np.stack([np.arange(BATCH), np.arange(BATCH)], 1).astype(np.int32)
    mixed = MixUp(1.0, CLASSES)(hard, seeds)
    classify = jax.jit(objective.functions()["classify"])
    scores = np.asarray(classify(params, mixed["image"]), np.float64)
    for train, smoothing in ((True, 0.2), (False, 0.0)):
        value, output = loss_of(objective, train)(params, mixed)
        expected = torch.nn.functional.cross_entropy(
            torch.tensor(scores), torch.tensor(mixed["label"]).double(), label_smoothing=smoothing
        )
        np.testing.assert_allclose(value, expected, rtol=1e-4)
    hits, count = output.metrics["accuracy"]
    assert hits / count == np.mean(scores.argmax(1) == mixed["label"].argmax(1))
    one_hot = {**hard, "label": np.eye(CLASSES, dtype=np.float32)[hard["label"]]}
    soft, plain = (loss_of(objective)(params, fields)[0] for fields in (one_hot, hard))
    np.testing.assert_allclose(soft, plain, rtol=1e-6)


def test_microbatches_equal_the_whole_batch(answering):
    found, fields = [], jax.tree.map(jnp.asarray, batch())
    for parts in (1, 4):
        in_parts = loss_in_parts(answering.objective, parts)
        loss = lambda p: in_parts(p, fields, Context(KEY))[0]  # noqa: B023, E731
        found.append(jax.jit(jax.value_and_grad(loss))(answering.params))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    leaves = [jax.tree.leaves(jax.tree.map(np.asarray, gradient)) for _, gradient in found]
    total = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves[0]))
    for one, other in zip(*leaves, strict=True):
        assert np.abs(one - other).max() <= 1e-5 * total
    assert total > 1e-2


def test_pixels_may_be_float_with_the_same_scores():
    objective, params = start(CLASSIFICATION)
    image = batch()["image"]
    classify = jax.jit(objective.functions()["classify"])
    exact = classify(params, image)
    np.testing.assert_array_equal(exact, classify(params, image.astype(np.float32)))
    assert np.abs(exact - classify(params, image + np.float32(0.4))).max() > 1e-4
    gradient = jax.jit(jax.grad(lambda x: classify(params, x)[:, 0].sum()))(
        image.astype(np.float32)
    )
    assert np.isfinite(gradient).all() and np.abs(gradient).max() > 0
    np.testing.assert_allclose(Pixels().normalize(jnp.full((1, 1, 1, 3), 127.5)), 0, atol=1e-6)


def test_a_new_head_gives_all_classes_the_same_score():
    objective = make_objective(CLASSIFICATION, None)
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(0), spec_of(batch()))))()
    value, _ = loss_of(objective)(params, batch())
    np.testing.assert_allclose(value, np.log(CLASSES), rtol=1e-3)


def config_of(section):
    config = config_lib.base()
    config.batch_size = BATCH
    config.duration = config_lib.duration(steps=10)
    config.objective.update(section)
    return config


def setup_of(config):
    from vlp_jax.parallel import mesh as mesh_lib
    from vlp_jax.training.setup import make_setup

    mesh = mesh_lib.make_mesh({"replica": 1}, jax.devices()[:1])
    spec = {k: (v.shape, v.dtype) for k, v in batch().items()}
    return make_setup(config, mesh, TOKENIZER, spec, epoch_examples=64)


def test_layer_decay_reaches_the_head_with_one_and_the_patches_with_the_least():
    config = config_of(CLASSIFICATION)
    config.optimizer.layer_decay.image = 0.5
    setup = setup_of(config)
    factors = param_groups.layer_factors(setup.abstract.params, {"image": 0.5})
    assert not any(path.startswith("head/") for path in factors)
    smallest = {p for p, f in factors.items() if np.min(f) == 0.5**3}
    assert {p.split("/")[1] for p in smallest} == {"patch_embedding", "position_embedding"}
    # And the updates follow: of the same gradients, against the same optimizer without decay.
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), setup.abstract.params)
    updates = []
    for decay in (0.5, 1.0):
        config.optimizer.layer_decay.image = decay
        optimizer = setup_of(config).optimizer
        updates.append(param_groups.flatten(
            jax.jit(lambda p, o=optimizer: o.update(p, o.init(p), p)[0])(params)
        ))  # fmt: skip
    for path, factor in (("head/kernel", 1), ("image/patch_embedding/projection/kernel", 0.125)):
        np.testing.assert_allclose(updates[0][path], factor * updates[1][path], rtol=1e-5)


def test_a_probe_trains_its_head_alone():
    config = config_of(CLASSIFICATION)
    config.optimizer.frozen = ("image/.*",)
    setup = setup_of(config)
    state = helpers.fresh(setup)
    before = jax.tree.map(np.asarray, state.params)
    from vlp_jax.parallel.batch import put_batch

    step = helpers.compiled(setup)
    for _ in range(2):
        state, _ = step(state, put_batch(batch(), setup.mesh))
    jax.tree.map(np.testing.assert_array_equal, before["image"], state.params["image"])
    assert np.abs(before["head"]["kernel"] - state.params["head"]["kernel"]).max() > 1e-5


# Question answering.


def test_answers_depend_on_image_and_question_and_not_on_padding(answering):
    fields = batch()
    inputs = {k: fields[k] for k in ("image", "text")}
    scores = answering.answer(answering.params, inputs)
    assert scores.shape == (BATCH, CLASSES) and scores.dtype == jnp.float32
    for name in inputs:
        other = {**inputs, name: inputs[name][::-1]}
        assert np.abs(answering.answer(answering.params, other) - scores).max() > 1e-3
    # What the embedding of the padding is does not matter, nor its position. (A constant would be
    # taken out by LayerNorm anywhere.)
    shift = 7 * np.random.default_rng(0).normal(size=TOWER["width"]).astype(np.float32)
    params = jax.tree.map(lambda x: x, answering.params)
    table = np.array(params["text"]["token_embedding"]["embedding"])
    table[0] += shift
    positions = np.array(params["text"]["position_embedding"])
    positions[4:] += shift
    params["text"]["token_embedding"]["embedding"] = table
    params["text"]["position_embedding"] = positions
    np.testing.assert_allclose(answering.answer(params, inputs), scores, atol=1e-5)
    positions[3] += shift
    assert np.abs(answering.answer(params, inputs) - scores).max() > 1e-3


def test_towers_have_the_paths_of_a_dual_encoder(answering):
    contrastive = make_objective(
        {
            "name": "contrastive",
            "embed_dim": 8,
            "image": IMAGE,
            "text": {**QUESTIONS["text"], "pooling": "mean"},
        },
        TOKENIZER,
    )
    dual = jax.eval_shape(lambda: nn.unbox(contrastive.init(jax.random.key(0), spec_of(batch()))))
    for tower in ("image", "text"):
        shapes = [
            {path: leaf.shape for path, leaf in param_groups.flatten(tree[tower]).items()}
            for tree in (dual, answering.params)
        ]
        assert shapes[0] == shapes[1]


def test_flops_are_those_that_xla_counts():
    for section in (CLASSIFICATION, QUESTIONS):
        objective = make_objective({**section, "scan_layers": False}, TOKENIZER)
        spec = spec_of(batch())
        params = jax.eval_shape(lambda: nn.unbox(objective.init(jax.random.key(0), spec)))  # noqa: B023
        inputs = [spec["image"]] if section is CLASSIFICATION else [spec["image"], spec["text"]]
        run = lambda p, *x: objective.model.apply({"params": p}, *x)  # noqa: B023, E731
        counted = jax.jit(run).lower(params, *inputs).compile().cost_analysis()["flops"]
        forms = (closed_forms.question_answerer, closed_forms.classifier)
        own = forms[section is CLASSIFICATION](objective.model) * BATCH
        assert own < counted < 1.5 * own  # softmax and LayerNorm are not in ours


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({**CLASSIFICATION, "loss": "hinge"}, "known: softmax, sigmoid"),
        ({**CLASSIFICATION, "label_smoothing": 1.0}, r"must be in \[0, 1\)"),
        ({**CLASSIFICATION, "classes": 1}, "at least 2"),
        ({**CLASSIFICATION, "image": {**IMAGE, "pooling": "none"}}, "needs a pooling"),
        ({**QUESTIONS, "answers": 1}, "at least 2"),
        ({**QUESTIONS, "fusion": {**TOWER, "heads": 3}}, "3 heads do not divide"),
        ({**QUESTIONS, "fusion": {**TOWER, "head": 3}}, "did you mean 'heads'"),
    ],
)
def test_bad_sections(section, message):
    with pytest.raises(UserError, match=message):
        make_objective(section, TOKENIZER)


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (None, "has no 'label', which the objective reads"),
        (((BATCH, 3), np.float32), "shares of 3 classes, and classes is 5"),
        (((BATCH,), np.float32), "holds no classes"),
    ],
)
def test_a_batch_without_labels_of_these_classes(label, message):
    spec = spec_of(batch())
    del spec["label"]
    if label is not None:
        spec["label"] = jax.ShapeDtypeStruct(*label)
    with pytest.raises(ValueError, match=message):
        check_reads(make_objective(CLASSIFICATION, None), spec)

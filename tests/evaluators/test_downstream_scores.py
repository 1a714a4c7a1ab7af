"""Accuracy, answers, loss and robustness on any number of devices and batch sizes."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from vlp_jax.errors import UserError
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.attacks import with_attacks
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.evaluators.corruptions import corrupt
from vlp_jax.evaluators.loss import evaluator_functions
from vlp_jax.objectives import make_objective
from vlp_jax.objectives.base import PIXELS, TOKENS, Context, Function, of_images
from vlp_jax.parallel import mesh as mesh_lib

N, CLASSES, WORDS, LENGTH, KINDS, SIDE = 37, 7, 11, 4, 3, 8
LAYOUTS = [(1, 37), pytest.param(1, 8, marks=pytest.mark.slow), (8, 16)]
TOWER = {"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2}
IMAGE = {"variant": "mu/4", "image_size": SIDE, "class_token": False, **TOWER}
TOKENIZER = types.SimpleNamespace(vocab_size=WORDS, context_length=LENGTH, pad_id=0, eos_id=2)
CONTRASTIVE = {"name": "contrastive", "embed_dim": 8, "image": {**IMAGE, "pooling": "mean"},
               "text": {"variant": "mu", **TOWER}}  # fmt: skip
MAE = {"name": "masked_autoencoding", "image": IMAGE, "decoder": TOWER}
CLASSIFICATION = {"name": "classification", "classes": CLASSES, "label_smoothing": 0.1,
                  "image": {**IMAGE, "pooling": "mean"}}  # fmt: skip


def functions():
    """Scores that are linear in pixels and in counts of tokens."""

    def classify(params, image):
        return image.reshape(len(image), -1).astype(jnp.float32) @ params["image"]

    def answer(params, x):
        words = jax.nn.one_hot(x["text"], WORDS).sum(axis=1) @ params["text"]
        return classify(params, x["image"]) + 100 * words

    both = {"image": PIXELS, "text": TOKENS}
    return {
        "classify": of_images(classify, "scores"),
        "answer": Function(answer, both, "scores"),
    }


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8),
        "text": rng.integers(3, WORDS, (N, LENGTH)).astype(np.int32),
        "kind": (np.arange(N) % KINDS).astype(np.int32),
    }
    params = {
        "image": rng.normal(size=(SIDE * SIDE * 3, CLASSES)).astype(np.float32),
        "text": rng.normal(size=(WORDS, CLASSES)).astype(np.float32),
    }
    scores = arrays["image"].reshape(N, -1) / 1.0 @ params["image"]
    answers = scores + 100 * np.eye(WORDS)[arrays["text"]].sum(1) @ params["text"]
    # Right more often than by chance, and of classes of different sizes.
    for field, own in (("label", scores), ("answer", answers)):
        guess = rng.integers(0, CLASSES, N) ** 2 % CLASSES
        arrays[field] = np.where(rng.random(N) < 0.4, own.argmax(1), guess).astype(np.int32)
    return types.SimpleNamespace(arrays=arrays, params=params, scores=scores, answers=answers)


def evaluator(world, devices, batch_size, section, made=None, drop=()):
    mesh = mesh_lib.make_mesh({"replica": devices}, jax.devices()[:devices])
    made = compile_functions(with_attacks(functions()) if made is None else made, mesh)
    resources = Resources(made, TOKENIZER, mesh, batch_size)
    arrays = {name: value for name, value in world.arrays.items() if name not in drop}
    data = {"source": "arrays", "arrays": arrays}
    return make_evaluators({"x": section}, data, resources)["x"]


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS)
def test_accuracy_is_that_of_scikit_learn(world, devices, batch_size):
    scores = dict(evaluator(world, devices, batch_size, {"name": "accuracy"})(world.params))
    labels, guess = world.arrays["label"], world.scores.argmax(1)
    assert scores["top1"] == pytest.approx(metrics.accuracy_score(labels, guess))
    top5 = metrics.top_k_accuracy_score(labels, world.scores, k=5, labels=range(CLASSES))
    assert scores["top5"] == pytest.approx(top5)
    mean = metrics.recall_score(labels, guess, labels=np.unique(labels), average="macro")
    assert scores["mean_per_class"] == pytest.approx(mean)
    assert scores["examples"] == N and scores["classes"] == CLASSES
    assert len({scores["top1"], scores["top5"], scores["mean_per_class"]}) == 3


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS)
def test_answers_over_all_and_by_kind(world, devices, batch_size):
    section = {"name": "answers", "kinds": ("color", "count")}  # of the third there is no name
    scores = dict(evaluator(world, devices, batch_size, section)(world.params))
    right = world.answers.argmax(1) == world.arrays["answer"]
    kinds = world.arrays["kind"]
    assert scores["accuracy"] == pytest.approx(right.mean())
    for number, name in enumerate(("color", "count", "2")):
        assert scores[f"accuracy_{name}"] == pytest.approx(right[kinds == number].mean())
    assert scores["questions"] == N
    assert scores["most_common"] == np.bincount(world.arrays["answer"]).max() / N
    answers = world.arrays["answer"]
    best = [np.bincount(answers[kinds == kind]).max() for kind in range(KINDS)]
    assert scores["most_common_of_kind"] == pytest.approx(sum(best) / N)
    without = evaluator(world, devices, batch_size, {"name": "answers"}, drop=("kind",))
    assert set(dict(without(world.params))) == {"accuracy", "questions", "most_common"}


def test_equal_scores_are_no_success(world):
    nothing = {name: np.zeros_like(value) for name, value in world.params.items()}
    assert dict(evaluator(world, 1, 8, {"name": "accuracy"})(nothing))["top1"] == 0
    broken = {**world.params, "image": world.params["image"] * np.nan}
    assert dict(evaluator(world, 1, 8, {"name": "accuracy"})(broken))["top5"] == 0


# Loss.


def started(section):
    objective = make_objective(section, TOKENIZER)
    spec = {"image": jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), np.uint8),
            "text": jax.ShapeDtypeStruct((1, LENGTH), np.int32),
            "label": jax.ShapeDtypeStruct((1,), np.int32)}  # fmt: skip
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(1), spec)))()
    # Parameters that are far from their start, at which many scores are equal.
    rng = np.random.default_rng(2)
    moved = lambda x: (x + 0.2 * rng.normal(size=x.shape)).astype(np.float32)  # noqa: E731
    return objective, jax.tree.map(moved, jax.tree.map(np.asarray, params))


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS[1:])
def test_loss_of_a_mean_over_examples_is_exact(world, devices, batch_size):
    objective, params = started(CLASSIFICATION)
    found = evaluator(world, devices, batch_size, {"name": "loss"}, evaluator_functions(objective))
    scores = dict(found(params))
    logits = np.asarray(jax.jit(objective.functions()["classify"])(params, world.arrays["image"]))
    labels = world.arrays["label"]
    shares = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(1)[:, None]
    expected = metrics.log_loss(labels, shares, labels=range(CLASSES))
    assert scores["loss"] == pytest.approx(expected, rel=1e-4)  # without label smoothing
    assert scores["accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
    assert scores["examples"] == N


def test_loss_of_a_masked_autoencoder_does_not_depend_on_batches(world):
    objective, params = started(MAE)
    found = [
        dict(evaluator(world, *layout, {"name": "loss"}, evaluator_functions(objective))(params))
        for layout in ((1, 37), (2, 8))
    ]
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=1e-5)
    assert found[0]["examples"] == found[1]["examples"] == N


def test_loss_of_whole_batches_leaves_out_what_does_not_fill_one(world):
    devices = 8
    objective, params = started(CONTRASTIVE)
    section = {"name": "loss", "batch_size": 16}
    scores = dict(evaluator(world, devices, 8, section, evaluator_functions(objective))(params))
    context = Context(jax.random.key(0), train=False)
    expected, loss = [], jax.jit(lambda p, b: objective.loss(p, b, context)[0])
    for first in (0, 16):
        batch = {k: world.arrays[k][first : first + 16] for k in ("image", "text")}
        expected.append(loss(params, batch))
    assert scores["loss"] == pytest.approx(np.mean(expected), rel=1e-5)
    assert scores["examples"] == 32
    with pytest.raises(UserError, match="whole batches of 40, and the split has 37 examples"):
        evaluator(world, 1, 40, {"name": "loss"}, evaluator_functions(objective))


def test_loss_of_a_composite_with_data_of_its_own(world):
    parts = {"classes": CLASSIFICATION, "mae": {**MAE, "data": "more", "weight": 0.5}}
    objective = make_objective({"name": "composite", "parts": parts}, TOKENIZER)
    alone, params = started(CLASSIFICATION)
    mae, of_mae = started(MAE)
    params = {**of_mae, **params, "image": {**of_mae["image"], **params["image"]}}
    more = {"source": "arrays", "arrays": {"image": world.arrays["image"][::-1].copy()}}
    section = {"name": "loss", "extra_data": {"more": more}}
    scores = dict(evaluator(world, 2, 8, section, evaluator_functions(objective))(params))
    one = dict(evaluator(world, 1, 37, {"name": "loss"}, evaluator_functions(alone))(params))
    reverse = types.SimpleNamespace(arrays=more["arrays"])
    made = evaluator_functions(
        make_objective({"name": "composite", "parts": {"mae": MAE}}, TOKENIZER)
    )
    assert scores["classes/loss"] == pytest.approx(one["loss"], rel=1e-5)
    total = scores["classes/loss"] + 0.5 * scores["mae/loss"]
    assert scores["loss"] == pytest.approx(total, rel=1e-5)
    other = dict(evaluator(reverse, 1, 37, {"name": "loss"}, made)(params))
    assert scores["mae/loss"] == pytest.approx(other["mae/loss"], rel=0.2)  # other masks
    assert scores["examples"] == N


# Robustness.


@pytest.mark.parametrize(("devices", "batch_size"), [(1, 37), (8, 16)])
def test_robustness_under_corruptions_and_attacks(world, devices, batch_size):
    section = {"name": "robustness", "corruptions": ("contrast", "gaussian_noise"),
               "severities": (1, 5), "radii": (1, 8), "steps": 4}  # fmt: skip
    # Scores so large that the softmax has no gradient left cannot be attacked.
    params = {name: value / 500 for name, value in world.params.items()}
    scores = dict(evaluator(world, devices, batch_size, section)(params))
    labels = world.arrays["label"]
    assert scores["clean"] == pytest.approx((world.scores.argmax(1) == labels).mean())
    means = []
    for name in ("contrast", "gaussian_noise"):
        values = []
        for severity in (1, 5):
            images = corrupt(world.arrays["image"], np.arange(N), name, severity)
            guess = (np.asarray(images).reshape(N, -1) @ world.params["image"]).argmax(1)
            values.append(scores[f"{name}_{severity}"])
            assert values[-1] == pytest.approx((guess == labels).mean(), abs=1.01 / N)
        means.append(scores[name])
        assert scores[name] == pytest.approx(np.mean(values))
    assert scores["corruption_mean"] == pytest.approx(np.mean(means))
    assert scores["corruption_relative"] == pytest.approx(np.mean(means) / scores["clean"])
    for radius in (1, 8):
        assert scores[f"pgd_{radius}"] <= scores[f"fgsm_{radius}"] <= scores["clean"]
    assert scores["pgd_8"] <= scores["pgd_1"] and scores["fgsm_8"] < scores["clean"]
    assert scores["examples"] == N


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "robustness", "radii": (0,)}, "numbers above 0"),
        ({"name": "robustness", "steps": 0}, "at least 1"),
        ({"name": "robustness", "severities": ()}, "set corruptions to"),
        ({"name": "robustness", "corruptions": ("snow",)}, "unknown"),
        ({"name": "robustness", "templates": ("{}",), "class_names": ("a", "b")}, "embed"),
        ({"name": "accuracy", "label_field": "class"}, "no whole numbers 'class'"),
        ({"name": "answers", "questions": 6}, "no choose_question"),
        ({"name": "answers", "questions": 0}, "at least 1"),
        ({"name": "reconstruction"}, "needs reconstruction_error"),
    ],
)
def test_mistakes(world, section, message):
    with pytest.raises(UserError, match=message):
        evaluator(world, 1, 8, section)


def test_a_label_without_a_score_is_told(world):
    narrow = {"image": world.params["image"][:, :2], "text": world.params["text"][:, :2]}
    for name in ("accuracy", "answers"):
        with pytest.raises(UserError, match="the model scores 2 classes"):
            dict(evaluator(world, 1, 8, {"name": name})(narrow))

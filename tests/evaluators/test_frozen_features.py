"""linear_probe, knn, few_shot and geometry as evaluators: their data, and what they share."""

import collections
import dataclasses

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from toy_models import (
    CLASS_NAMES,
    CLASSES,
    LAYOUTS,
    functions,
    make_resources,
    make_world,
)

from vlp_jax.errors import UserError
from vlp_jax.evaluators import geometry, make_evaluators
from vlp_jax.evaluators.base import EmbeddingCache

TRAIN = 211


@pytest.fixture(scope="module")
def world():
    """The label of an image is written into its pixels, with noise."""
    world, rng = make_world(), np.random.default_rng(1)

    def split(count):
        labels = np.arange(count) % CLASSES
        patterns = np.random.default_rng(9).integers(0, 120, (CLASSES, 4, 4, 3))
        image = patterns[labels] + rng.integers(0, 136, (count, 4, 4, 3))
        return {"image": image.astype(np.uint8), "label": labels.astype(np.int32)}

    world.train, world.test = split(TRAIN), {**world.arrays, **split(37)}
    return world


def make(world, sections, devices=1, batch_size=8, own_functions=None, train=None):
    data = {"source": "arrays", "arrays": world.test}
    for section in sections.values():
        if section["name"] in ("knn", "linear_probe", "few_shot"):
            section["train_data"] = {"arrays": train or world.train}
    resources = make_resources(devices, batch_size, own_functions)
    return resources, make_evaluators(sections, data, resources)


def features(world, split):
    return split["image"].reshape(len(split["image"]), -1) / 1.0 @ world.params["image"]


SECTIONS = {
    "sweep": {"name": "linear_probe", "grid": (300.0, 1e4, 1e6)},
    "sgd": {"name": "linear_probe", "method": "sgd", "epochs": 5, "batch_size": 32},
    "knn": {"name": "knn"},
    "few": {"name": "few_shot", "shots": (1, 4), "seeds": 2},
    "geometry": {"name": "geometry"},
}


@pytest.fixture(scope="module")
def reference(world):
    _, found = make(world, {key: dict(section) for key, section in SECTIONS.items()})
    return {key: dict(evaluator(world.params)) for key, evaluator in found.items()}


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS[2:])
def test_scores_do_not_depend_on_devices_and_batches(world, reference, devices, batch_size):
    sections = {key: dict(section) for key, section in SECTIONS.items()}
    _, found = make(world, sections, devices, batch_size)
    for key, evaluator in found.items():
        assert dict(evaluator(world.params)) == pytest.approx(reference[key], abs=1e-6), key


def test_the_probe_is_logistic_regression_on_the_features(world, reference):
    scores = reference["sweep"]
    train, test = features(world, world.train), features(world, world.test)
    model = LogisticRegression(C=1 / scores["l2"], max_iter=1000).fit(train, world.train["label"])
    assert scores["top1"] == pytest.approx(model.score(test, world.test["label"]))
    assert scores["top1"] > 2 / CLASSES and scores["top5"] == 1
    assert scores["train_examples"] == TRAIN and scores["examples"] == 37
    assert reference["sgd"]["top1"] > 2 / CLASSES
    assert reference["sgd"]["learning_rate"] in (0.01, 0.1, 1.0)


def test_the_regularization_is_chosen_on_training_images_alone(world):
    sections = {"x": {"name": "linear_probe", "grid": (300.0, 1e4, 1e7)}}
    outcome = make(world, sections)[1]["x"].outcome(world.params)
    order = np.random.default_rng(0).permutation(TRAIN)
    held, kept = order[: round(0.2 * TRAIN)], order[round(0.2 * TRAIN) :]
    x, labels = features(world, world.train), world.train["label"]
    for l2, accuracy in outcome.tried.items():
        model = LogisticRegression(C=1 / l2, max_iter=1000).fit(x[kept], labels[kept])
        assert accuracy == pytest.approx(model.score(x[held], labels[held]), abs=0.03)
    assert outcome.tried[outcome.chosen] == max(outcome.tried.values())
    assert len(set(outcome.tried.values())) > 1


def test_knn_is_scikit_learns(world, reference):
    train, test = features(world, world.train), features(world, world.test)
    for k in (1, 5, 20):
        model = KNeighborsClassifier(
            k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
        ).fit(train, world.train["label"])
        expected = model.score(test, world.test["label"])
        assert reference["knn"][f"top1_k{k}"] == pytest.approx(expected, abs=1e-9)
        assert expected > 1.5 / CLASSES


def test_few_shots_learn_more_from_more(world, reference):
    few = reference["few"]
    assert 1 / CLASSES < few["top1_1shot"] < few["top1_4shot"] and few["top1_1shot_std"] >= 0
    other = {"x": {"name": "few_shot", "shots": (4,), "seeds": 2}}
    assert dict(make(world, other)[1]["x"](world.params))["top1_4shot"] == few["top1_4shot"]


def test_geometry_is_that_of_the_embeddings(world, reference):
    _, found = make(world, {"x": {"name": "geometry"}})
    outcome = found["x"].outcome(world.params)
    np.testing.assert_allclose(outcome.text, world.texts, atol=1e-5)
    scores = reference["geometry"]
    expected = ((outcome.image.astype(float) - outcome.text) ** 2).sum(1).mean()
    assert scores["alignment"] == pytest.approx(expected)
    assert scores["text_uniformity"] == geometry.uniformity(outcome.text)
    assert scores["image_effective_rank"] == geometry.effective_rank(outcome.image)


def counted(calls):
    def count(name, function):
        def called(params, array):
            import jax

            jax.debug.callback(lambda: calls.update([name]))
            return function(params, array)

        return dataclasses.replace(function, call=called)

    return {name: count(name, function) for name, function in functions().items()}


def test_what_several_evaluators_ask_for_is_computed_once(world):
    calls = collections.Counter()
    sections = {
        "a": {"name": "retrieval"},
        "b": {"name": "geometry"},
        "c": {"name": "zero_shot", "class_names": CLASS_NAMES, "templates": ("{}",)},
        "d": {"name": "knn", "features": "embed_image"},
        "e": {"name": "few_shot", "features": "embed_image", "shots": (1,), "seeds": 1},
    }
    resources, found = make(world, sections, batch_size=40, own_functions=counted(calls))
    expected = {}
    for key, evaluator in found.items():  # each for itself
        expected[key] = dict(evaluator(world.params))
    alone = dict(calls)
    calls.clear()
    with resources.one_evaluation(world.params):
        shared = {key: dict(evaluator(world.params)) for key, evaluator in found.items()}
        assert resources.cache.bytes > 0
    assert shared == expected
    # One batch of test images and six of training images; one of texts and one of prompts.
    assert calls["embed_image"] == 1 + 6 and calls["embed_text"] == 1 + 1
    assert alone["embed_image"] == 5 + 2 * 6 and alone["embed_text"] == 2 + 1
    assert resources.cache.bytes == 0
    calls.clear()
    dict(found["a"](world.params))
    assert calls["embed_image"] == 1  # nothing is left of it


def test_other_parameters_are_computed_anew(world):
    resources, found = make(world, {"x": {"name": "geometry"}})
    other = {**world.params, "image": world.params["image"][::-1].copy()}
    with resources.one_evaluation(world.params):
        one = dict(found["x"](world.params))
        two = dict(found["x"](other))
        assert dict(found["x"](world.params)) == one
    assert one["alignment"] != two["alignment"]
    with resources.one_evaluation(other):
        assert dict(found["x"](other)) == two


def test_the_cache_is_bounded_and_read_only():
    cache, params = EmbeddingCache(max_bytes=100), object()
    with cache.open(params):
        cache.put(params, "small", np.zeros(5))
        cache.put(params, "large", np.zeros(10))
        assert cache.get(params, "large") is None
        with pytest.raises(ValueError, match="read-only"):
            cache.get(params, "small")[0] = 1
        with cache.open(params):  # nested: the same evaluation
            assert cache.get(params, "small") is not None
        with cache.open(object()):
            assert cache.get(params, "small") is None
        assert cache.get(params, "small") is not None
    assert cache.get(params, "small") is None


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "linear_probe", "method": "lbgfs"}, "did you mean 'lbfgs'"),
        ({"name": "linear_probe", "grid": (0.0, 1.0)}, "grid needs numbers above 0"),
        ({"name": "linear_probe", "features": "pixels"}, "no function 'pixels' .it has: embed_im"),
        ({"name": "linear_probe", "epochs": 0}, "must be at least 1"),
        ({"name": "knn", "ks": ()}, "must be at least 1"),
        ({"name": "few_shot", "shots": (0,)}, "must be at least 1"),
        ({"name": "few_shot", "grid": ()}, "grid needs numbers above 0"),
        ({"name": "geometry", "train_data": {}}, "unknown key 'train_data'"),
    ],
)
def test_mistakes(world, section, message):
    with pytest.raises(UserError, match=message):
        make(world, {"x": section})


def test_train_data_is_needed(world):
    data = {"source": "arrays", "arrays": world.test}
    with pytest.raises(UserError, match=r"config.evaluators.x lacks train_data"):
        make_evaluators({"x": {"name": "knn"}}, data, make_resources())


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "knn", "ks": (30,)}, "train_data has 12 examples: raise its limit"),
        ({"name": "few_shot", "shots": (3,)}, "3 classes have fewer training images"),
        ({"name": "linear_probe", "holdout": 0.01}, "holdout=0.01 of 12 training examples"),
        ({"name": "knn", "label_field": "image"}, "no number 'image' .they have: label"),
    ],
)
def test_too_little_to_train_on(world, section, message):
    train = {name: array[:12] for name, array in world.train.items()}
    with pytest.raises(UserError, match=message):
        make(world, {"x": section}, train=train)[1]["x"].outcome(world.params)

"""Evaluators against independent NumPy computations, on any number of devices and batch sizes."""

import dataclasses

import jax
import numpy as np
import pytest
from toy_models import (
    CLASS_NAMES,
    CLASSES,
    LAYOUTS,
    LOGIT_SCALE,
    WORDS,
    N,
    WordTokenizer,
    evaluators,
    make_resources,
    make_world,
    text_vectors,
    unit,
)

from vlp_jax.data.wording import Wording
from vlp_jax.errors import NotFinite, UserError
from vlp_jax.evaluators import differing_wordings, make_evaluators
from vlp_jax.evaluators.base import Resources
from vlp_jax.evaluators.splits import Split
from vlp_jax.parallel import mesh as mesh_lib


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS)
def test_retrieval_equals_numpy(world, devices, batch_size):
    evaluator = evaluators(world, devices, batch_size, {"x": {"name": "retrieval"}})["x"]
    scores = dict(evaluator(world.params))
    similarity = world.images @ world.texts.T
    for name, matrix in (("image_to_text", similarity), ("text_to_image", similarity.T)):
        order = np.argsort(-matrix, axis=1)
        place = [int(np.flatnonzero(order[i] == i)[0]) for i in range(N)]
        for k in (1, 5, 10):
            assert scores[f"{name}_r{k}"] == pytest.approx(np.mean(np.array(place) < k), abs=1e-6)
        assert scores[f"{name}_median_rank"] == np.median(place) + 1
        assert scores[f"{name}_mrr"] == pytest.approx(np.mean(1 / (np.array(place) + 1)))
    assert scores["pairs"] == N and scores["chance_r1"] == 1 / N
    assert 0 < scores["image_to_text_r10"] < 1  # neither trivial nor perfect


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS)
def test_zero_shot_equals_numpy(world, devices, batch_size):
    templates = ("a {}", "one {} here", "{}!")
    section = {"name": "zero_shot", "templates": templates, "class_names": CLASS_NAMES}
    evaluator = evaluators(world, devices, batch_size, {"x": section})["x"]
    scores = dict(evaluator(world.params))
    tokenizer = WordTokenizer()
    vectors = []
    for name in CLASS_NAMES:
        tokens = tokenizer([t.format(name) for t in templates])
        prompts = unit(np.eye(WORDS)[tokens].sum(1) @ world.params["text"])
        vectors.append(unit(prompts.mean(axis=0)))
    logits = world.images @ np.stack(vectors).T
    assert scores["top1"] == pytest.approx((logits.argmax(1) == world.arrays["label"]).mean())
    top5 = np.argsort(-logits, axis=1)[:, :5]
    assert scores["top5"] == (top5 == world.arrays["label"][:, None]).any(1).mean()
    assert scores["examples"] == N and scores["chance"] == 1 / CLASSES
    hits = logits.argmax(1) == world.arrays["label"]
    recalls = [hits[world.arrays["label"] == c].mean() for c in range(CLASSES)]
    assert scores["mean_per_class_recall"] == pytest.approx(np.mean(recalls), abs=1e-6)
    p = np.exp(LOGIT_SCALE * logits)
    p /= p.sum(1, keepdims=True)
    own = p[np.arange(N), world.arrays["label"]]
    assert scores["nll"] == pytest.approx(-np.log(own).mean(), abs=1e-5)
    bins = np.ceil(p.max(1) * 15).astype(int)
    gaps = [abs((hits - p.max(1))[bins == b].sum()) for b in range(1, 16)]
    assert scores["calibration_error"] == pytest.approx(sum(gaps) / N, abs=1e-6)
    outcome = evaluator.outcome(world.params)
    np.testing.assert_allclose(outcome.probabilities, p, atol=1e-5)
    assert outcome.index.tolist() == list(range(N)) and outcome.scores() == scores


def test_zero_shot_without_a_temperature_has_no_calibration(world):
    section = {"name": "zero_shot", "class_names": CLASS_NAMES}
    evaluator = evaluators(world, 1, 8, {"x": section})["x"]
    del evaluator._resources.functions["logit_scale"]
    scores = dict(evaluator(world.params))
    assert "top1" in scores and not {"nll", "calibration_error"} & set(scores)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_names_and_templates_from_files(world, tmp_path, encoding):
    names, templates = "\n".join(CLASS_NAMES), "a {c}\n# no template\none {} here\n"
    (tmp_path / "names.txt").write_text(f"{names}\n# five\n\n", encoding)
    (tmp_path / "templates.txt").write_text(templates, encoding)
    files = {
        "class_names": str(tmp_path / "names.txt"),
        "templates": str(tmp_path / "templates.txt"),
    }
    inline = {"class_names": CLASS_NAMES, "templates": ("a {}", "one {} here")}
    found = evaluators(
        world,
        1,
        8,
        {"file": {"name": "zero_shot", **files}, "inline": {"name": "zero_shot", **inline}},
    )
    assert dict(found["file"](world.params)) == dict(found["inline"](world.params))
    assert found["file"].class_names == CLASS_NAMES


def test_embeddings_that_are_no_numbers_end_it(world):
    params = {**world.params, "image": world.params["image"] * np.nan}
    evaluator = evaluators(world, 1, 8, {"x": {"name": "retrieval"}})["x"]
    with pytest.raises(NotFinite, match="embed_image gives no finite numbers for 37 of 37"):
        evaluator.outcome(params)


def test_collapsed_zero_shot_scores_nothing(world):
    section = {"name": "zero_shot", "templates": ("same",), "class_names": CLASS_NAMES}
    with pytest.raises(UserError, match="need {}"):
        evaluators(world, 1, 8, {"x": section})
    section["templates"] = ("{}",)
    evaluator = evaluators(world, 1, 8, {"x": section})["x"]
    params = {**world.params, "text": np.ones_like(world.params["text"])}
    assert dict(evaluator(params))["top1"] == 0


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"x": {"name": "retreival"}}, "did you mean 'retrieval'"),
        ({"x": {"name": "retrieval", "k": 3}}, "unknown key 'k' in config.evaluators.x"),
        ({"x": {"name": "zero_shot"}}, "no names of the classes"),
        ({"x": {"name": "zero_shot", "class_names": ("a", "b", "a")}}, r"'a' \(2 times\)"),
        ({"x": {"name": "zero_shot", "class_names": "/no.txt"}}, "cannot read the file /no.txt"),
        ({"x": {"name": "zero_shot", "class_names": ("a",), "templates": ("{d}",)}}, "need {}"),
        ({"x": {"name": "retrieval", "ks": (0, 1)}}, "ks must be at least 1"),
        ({"x": {"name": "retrieval", "captions": "label"}}, "'label' holds numbers"),
        ({"x": {"name": "retrieval", "captions": "lable"}}, "did you mean 'label'"),
    ],
)
def test_mistakes(world, sections, message):
    with pytest.raises(UserError, match=message):
        evaluators(world, 1, 8, sections)


def test_a_label_beyond_the_classes_is_named(world):
    section = {"name": "zero_shot", "class_names": CLASS_NAMES[:3]}
    evaluator = evaluators(world, 1, 8, {"x": section})["x"]
    with pytest.raises(UserError, match="'label' goes from 0 to 4, and class_names has 3"):
        evaluator.outcome(world.params)
    section = {"name": "zero_shot", "class_names": CLASS_NAMES, "label_field": "text"}
    evaluator = evaluators(world, 1, 8, {"x": section})["x"]
    with pytest.raises(UserError, match="no number 'text' in the examples|'text'"):
        evaluator.outcome(world.params)


def test_missing_function_is_named(world):
    mesh = mesh_lib.make_mesh({"replica": 1}, jax.devices()[:1])
    resources = Resources({"embed_image": None}, WordTokenizer(), mesh, 8)
    with pytest.raises(UserError, match="needs embed_text, which the objective lacks"):
        make_evaluators({"x": {"name": "retrieval"}}, {}, resources)


LOWER = Wording((("lowercase", {}),))


def test_prompts_are_worded_as_the_run_words_its_texts(world):
    names = tuple(name.upper() for name in CLASS_NAMES)
    sections = {
        "zero_shot": {"name": "zero_shot", "templates": ("A {}",), "class_names": names},
        "robust": {
            "name": "robustness",
            **{"templates": ("A {}",), "class_names": names, "corruptions": (), "radii": ()},
        },
    }
    data = {"source": "arrays", "arrays": world.arrays}
    resources = dataclasses.replace(make_resources(), wording=LOWER)
    worded = make_evaluators(sections, data, resources)
    vectors = text_vectors(world, [f"a {name.lower()}" for name in names])
    np.testing.assert_allclose(
        worded["zero_shot"].class_embeddings(world.params), vectors, atol=1e-5
    )
    hits = ((world.images @ vectors.T).argmax(1) == world.arrays["label"]).mean()
    assert dict(worded["zero_shot"](world.params))["top1"] == pytest.approx(hits)
    assert dict(worded["robust"](world.params))["clean"] == pytest.approx(hits)
    raw = make_evaluators(sections, data, make_resources())["zero_shot"]
    assert not np.allclose(raw.class_embeddings(world.params), vectors, atol=1e-2)


def test_evaluation_texts_that_are_worded_in_another_way_are_told():
    train = {"source": "folder", "path": "x", "preprocess": {"choose_text": {}, "lowercase": {}}}
    own = {"preprocess": {"choose_text": {"index": 0}}}
    sections = {
        "as_training": {"name": "retrieval", "data": {"split": "validation"}},
        "raw": {"name": "retrieval", "data": own},
        "loss": {"name": "loss", "data": own},
        "prompts": {"name": "zero_shot", "data": own},  # whose texts are no data's
    }
    notes = differing_wordings(sections, train, LOWER)
    assert len(notes) == 2 and "evaluators.raw" in notes[1] and "evaluators.loss" in notes[0]
    assert "lowercase" in notes[0] and "preprocess" in notes[0]


def test_arrays_stay_on_the_host_for_those_who_ask():
    world = make_world()
    rows = len(world.arrays["label"])
    arrays = {**world.arrays, "second": np.arange(rows * 6, dtype=np.float32).reshape(rows, 6)}
    data = {"source": "arrays", "arrays": arrays}
    plain, asked = (Split(make_resources(2, 8), data, names) for names in ((), ("second",)))
    assert set(plain.embed(world.params, {"image": "embed_image"}).fields) == {"label"}
    found = asked.embed(world.params, {"image": "embed_image"})
    np.testing.assert_array_equal(found.fields["second"], arrays["second"])

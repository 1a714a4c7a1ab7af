"""Evaluators against independent NumPy computations, on any number of devices and batch sizes."""

import types

import jax
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.parallel import mesh as mesh_lib

N, CLASSES, DIM, WORDS = 37, 5, 8, 11
CLASS_NAMES = tuple(f"class {i}" for i in range(CLASSES))


class WordTokenizer:
    """Every text is a row of numbers that depend on it alone."""

    context_length, vocab_size, pad_id, bos_id, eos_id = 4, WORDS, 0, 1, 2

    def __call__(self, texts):
        rows = [np.random.default_rng(list(t.encode())).integers(0, WORDS, 4) for t in texts]
        return np.stack(rows).astype(np.int32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def functions():
    """Embeddings that are linear in pixels and in counts of tokens."""

    def embed_image(params, image):
        x = image.reshape(len(image), -1).astype(np.float32) @ params["image"]
        return x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True)

    def embed_text(params, tokens):
        x = jax.nn.one_hot(tokens, WORDS).sum(axis=1) @ params["text"]
        return x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True)

    return {"embed_image": embed_image, "embed_text": embed_text}


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (N, 4, 4, 3)).astype(np.uint8),
        "text": rng.integers(0, WORDS, (N, 4)).astype(np.int32),
        "label": rng.integers(0, CLASSES, N).astype(np.int32),
    }
    params = {
        "image": (rng.normal(size=(48, DIM)) / 100).astype(np.float32),
        "text": rng.normal(size=(WORDS, DIM)).astype(np.float32),
    }
    images = unit(arrays["image"].reshape(N, -1) / 1.0 @ params["image"])
    texts = unit(np.eye(WORDS)[arrays["text"]].sum(1) @ params["text"])
    return types.SimpleNamespace(arrays=arrays, params=params, images=images, texts=texts)


def evaluators(world, devices, batch_size, sections):
    mesh = mesh_lib.make_mesh({"replica": devices}, jax.devices()[:devices])
    resources = Resources(
        functions=compile_functions(functions(), mesh),
        tokenizer=WordTokenizer(),
        mesh=mesh,
        batch_size=batch_size,
    )
    return make_evaluators(sections, {"source": "arrays", "arrays": world.arrays}, resources)


LAYOUTS = [(1, 37), (1, 8), (2, 10), (8, 16), (8, 40)]


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
    ],
)
def test_mistakes(world, sections, message):
    with pytest.raises(UserError, match=message):
        evaluators(world, 1, 8, sections)


def test_missing_function_is_named(world):
    mesh = mesh_lib.make_mesh({"replica": 1}, jax.devices()[:1])
    resources = Resources({"embed_image": None}, WordTokenizer(), mesh, 8)
    with pytest.raises(UserError, match="needs embed_text, which the objective lacks"):
        make_evaluators({"x": {"name": "retrieval"}}, {}, resources)

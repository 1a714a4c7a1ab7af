"""Models that are linear in pixels and in counts of tokens, and what they come to in NumPy."""

import types

import jax
import numpy as np
import pytest

from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.objectives.base import Function, of_images, of_texts
from vlp_jax.parallel import mesh as mesh_lib

N, CLASSES, DIM, WORDS = 37, 5, 8, 11
CLASS_NAMES = tuple(f"class {i}" for i in range(CLASSES))
SLOW = pytest.mark.slow
LAYOUTS = [  # devices, batch size
    (1, 37),
    pytest.param(1, 8, marks=SLOW),
    (2, 10),
    pytest.param(8, 16, marks=SLOW),
    (8, 40),
]
LOGIT_SCALE = 7.0


class WordTokenizer:
    """Every text is a row of numbers that depend on it alone."""

    context_length, vocab_size, pad_id, bos_id, eos_id = 4, WORDS, 0, 1, 2

    def __call__(self, texts):
        texts = [t.encode() if isinstance(t, str) else t for t in texts]
        rows = [np.random.default_rng(list(t)).integers(0, WORDS, 4) for t in texts]
        return np.stack(rows).astype(np.int32)


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def functions():
    """Those of an objective with two towers."""

    def image_features(params, image):
        return image.reshape(len(image), -1).astype(np.float32) @ params["image"]

    def embed_image(params, image):
        x = image_features(params, image)
        return x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True)

    def embed_text(params, tokens):
        x = jax.nn.one_hot(tokens, WORDS).sum(axis=1) @ params["text"]
        return x / jax.numpy.linalg.norm(x, axis=-1, keepdims=True)

    return {
        "embed_image": of_images(embed_image, "unit vectors"),
        "embed_text": of_texts(embed_text, "unit vectors"),
        "image_features": of_images(image_features, "features"),
        "logit_scale": Function(lambda params, unused: params["logit_scale"], {}, "a factor"),
    }


def image_vectors(world, image):
    """What `embed_image` makes of uint8 images, in float64."""
    return unit(image.reshape(len(image), -1) / 1.0 @ world.params["image"])


def text_vectors(world, texts):
    """What `embed_text` makes of strings, in float64."""
    return unit(np.eye(WORDS)[WordTokenizer()(texts)].sum(1) @ world.params["text"])


def make_world():
    """Random examples and parameters."""
    rng = np.random.default_rng(0)
    arrays = {
        "image": rng.integers(0, 256, (N, 4, 4, 3)).astype(np.uint8),
        "text": rng.integers(0, WORDS, (N, 4)).astype(np.int32),
        "label": rng.integers(0, CLASSES, N).astype(np.int32),
    }
    params = {
        "image": (rng.normal(size=(48, DIM)) / 100).astype(np.float32),
        "text": rng.normal(size=(WORDS, DIM)).astype(np.float32),
        "logit_scale": np.float32(LOGIT_SCALE),
    }
    images = unit(arrays["image"].reshape(N, -1) / 1.0 @ params["image"])
    texts = unit(np.eye(WORDS)[arrays["text"]].sum(1) @ params["text"])
    return types.SimpleNamespace(arrays=arrays, params=params, images=images, texts=texts)


def make_resources(devices=1, batch_size=8, own_functions=None):
    """`Resources` of so many CPU devices."""
    mesh = mesh_lib.make_mesh({"replica": devices}, jax.devices()[:devices])
    compiled = compile_functions(own_functions or functions(), mesh)
    return Resources(compiled, WordTokenizer(), mesh, batch_size)


def evaluators(world, devices, batch_size, sections):
    """Evaluators of `sections` on the arrays of `world`."""
    resources = make_resources(devices, batch_size)
    return make_evaluators(sections, {"source": "arrays", "arrays": world.arrays}, resources)

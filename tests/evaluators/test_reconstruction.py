"""The reconstruction error against NumPy, on any number of devices and batch sizes."""

import types

import flax.linen as nn
import jax
import numpy as np
import pytest
from toy_models import LAYOUTS

from vlp_jax.errors import UserError
from vlp_jax.evaluators import make_evaluators
from vlp_jax.evaluators.base import Resources, compile_functions
from vlp_jax.models.masking import random_mask
from vlp_jax.objectives.base import of_images
from vlp_jax.objectives.masked_autoencoding import EVALUATION_SEED, make_masked_autoencoding
from vlp_jax.parallel import mesh as mesh_lib

N, SIZE, PATCH, MASK_RATIO = 37, 16, 4, 0.75
MEAN, STD = (0.5, 0.4, 0.6), (0.2, 0.3, 0.25)


def evaluator(functions, images, devices, batch_size):
    mesh = mesh_lib.make_mesh({"replica": devices}, jax.devices()[:devices])
    resources = Resources(compile_functions(functions, mesh), None, mesh, batch_size)
    data = {"source": "arrays", "arrays": {"image": images}}
    return make_evaluators({"x": {"name": "reconstruction"}}, data, resources)["x"]


@pytest.fixture(scope="module")
def images():
    # Later images are brighter, so that an average of averages of batches is another number.
    noise = np.random.default_rng(0).integers(0, 60, (N, SIZE, SIZE, 3))
    return (noise + np.arange(N)[:, None, None, None] ** 1.4).astype(np.uint8)


@pytest.mark.parametrize(("devices", "batch_size"), LAYOUTS)
def test_every_image_counts_once_whatever_the_batches(images, devices, batch_size):
    def error(params, image):
        return jax.numpy.square(image / 255.0 - params).mean(axis=(1, 2, 3))

    own = {"reconstruction_error": of_images(error, "errors")}
    scores = dict(evaluator(own, images, devices, batch_size)(0.25))
    errors = np.square(images / 255.0 - 0.25).mean(axis=(1, 2, 3))
    assert scores == {"error": pytest.approx(errors.mean(), rel=1e-5), "examples": N}
    last = N % batch_size
    if last and batch_size < N:  # there is a short batch: its mean has less weight
        parts = [errors[i : i + batch_size].mean() for i in range(0, N, batch_size)]
        assert abs(np.mean(parts) / errors.mean() - 1) > 1e-3


def numpy_patches(images):
    pixels = (images / 255.0 - MEAN) / STD
    rows = pixels.reshape(len(images), SIZE // PATCH, PATCH, SIZE // PATCH, PATCH, 3)
    return rows.swapaxes(2, 3).reshape(len(images), -1, PATCH * PATCH * 3)


@pytest.fixture(scope="module", params=[False, True], ids=["pixels", "normalized"])
def world(request):
    objective = make_masked_autoencoding(
        image={"variant": "mu/4", "image_size": SIZE, "width": 16, "depth": 1, "mlp_dim": 32,
               "heads": 2},
        decoder={"width": 16, "depth": 1, "mlp_dim": 32, "heads": 2},
        mask_ratio=MASK_RATIO, normalize_targets=request.param, image_mean=MEAN, image_std=STD,
        dtype="float32",
    )  # fmt: skip
    spec = {"image": jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), np.uint8)}
    params = jax.jit(lambda: nn.unbox(objective.init(jax.random.key(1), spec)))()
    predict = jax.jit(lambda *x: objective.model.apply({"params": params}, *x))
    return types.SimpleNamespace(objective=objective, params=params, predict=predict)


def test_a_masked_autoencoder_is_judged_on_hidden_patches_alone(world, images):
    devices, batch_size = 2, 10
    objective = world.objective
    scores = dict(evaluator(objective.functions(), images, devices, batch_size)(world.params))
    errors = []
    for first in range(0, N, batch_size):
        batch = images[np.minimum(np.arange(first, first + batch_size), N - 1)]
        patches = objective.model.image.patches
        mask = random_mask(jax.random.key(EVALUATION_SEED), batch_size, patches, patches // 4)
        predicted = np.asarray(world.predict(batch, mask))
        targets = numpy_patches(batch)
        if objective.normalize_targets:
            spread = np.sqrt(targets.var(axis=-1, ddof=1, keepdims=True) + 1e-6)
            targets = (targets - targets.mean(axis=-1, keepdims=True)) / spread
        by_patch = np.square(predicted - targets).mean(axis=-1)
        hidden = np.asarray(mask.hidden).astype(bool)
        assert (hidden.sum(axis=1) == patches * MASK_RATIO).all()
        errors += [row[chosen].mean() for row, chosen in zip(by_patch, hidden, strict=True)]
    assert scores["error"] == pytest.approx(np.mean(errors[:N]), rel=1e-4)
    assert scores["examples"] == N
    again = dict(evaluator(objective.functions(), images, devices, batch_size)(world.params))
    assert again == scores  # the masks do not change


def test_an_objective_that_does_not_paint_is_refused(images):
    with pytest.raises(UserError, match="needs reconstruction_error, which the objective lacks"):
        evaluator({"embed_image": of_images(len, "a number")}, images, 1, 8)

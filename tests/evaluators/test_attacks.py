"""Attacks against autograd of torch, and the properties that they must have."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from vlp_jax.evaluators.attacks import attacked_images, with_attacks
from vlp_jax.evaluators.robustness import REACH, fgsm, pgd

N, SIDE, HIDDEN, CLASSES = 12, 5, 16, 4
PIXELS = SIDE * SIDE * 3


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    weights = {
        "first": (rng.normal(size=(PIXELS, HIDDEN)) / 600).astype(np.float32),
        "second": rng.normal(size=(HIDDEN, CLASSES)).astype(np.float32),
    }
    images = rng.integers(0, 256, (N, SIDE, SIDE, 3)).astype(np.uint8)
    images[0], images[1] = 0, 255  # at the ends of the range
    return weights, images, rng.integers(0, CLASSES, N).astype(np.int32)


def scores(weights, x):
    return jnp.tanh(x.reshape(len(x), -1) @ weights["first"]) @ weights["second"]


def torch_gradient(weights, x, labels):
    x = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    first, second = (torch.tensor(w, dtype=torch.float64) for w in weights.values())
    out = torch.tanh(x.reshape(len(x), -1) @ first) @ second
    torch.nn.functional.cross_entropy(out, torch.tensor(labels).long(), reduction="sum").backward()
    return x.grad.numpy()


def attack(world, radius, settings, seed=0):
    weights, images, labels = world
    keys = jax.random.split(jax.random.key(seed), N)

    return np.asarray(_attack(weights, images, labels, keys, radius, settings))


@jax.jit
def _attack(weights, images, labels, keys, radius, settings):
    return attacked_images(
        lambda x: scores(weights, x), images, labels, keys, radius=radius, **settings
    )


def losses(world, x):
    weights, _, labels = world
    log = jax.nn.log_softmax(scores(weights, jnp.asarray(x, jnp.float32)))
    return -np.asarray(log)[np.arange(N), labels]


@pytest.mark.parametrize("radius", [1, 4])
def test_fgsm_is_one_step_along_the_sign_of_torchs_gradient(world, radius):
    weights, images, labels = world
    gradient = torch_gradient(weights, images.astype(np.float64), labels)
    expected = np.clip(images + radius * np.sign(gradient), 0, 255)
    clear = np.abs(gradient) > 1e-9
    assert clear.mean() > 0.99
    found = attack(world, radius, fgsm(radius))
    np.testing.assert_allclose(found[clear], expected[clear], atol=1e-4)


def test_pgd_is_steps_that_are_brought_back_into_the_ball(world):
    weights, images, labels = world
    radius, steps = 3.0, 4
    x = images.astype(np.float64)
    for _ in range(steps):
        x = x + REACH * radius / steps * np.sign(torch_gradient(weights, x, labels))
        x = np.clip(np.clip(x, images - radius, images + radius), 0, 255)
    found = attack(world, radius, {**pgd(radius, steps), "random_start": 0.0})
    assert np.mean(np.abs(found - x) < 1e-3) > 0.99


@pytest.mark.parametrize("radius", [0.5, 2, 8])
@pytest.mark.parametrize("settings", [fgsm, lambda r: pgd(r, 1), lambda r: pgd(r, 10)])
def test_no_value_leaves_the_ball_or_the_range(world, radius, settings):
    _, images, _ = world
    found = attack(world, radius, settings(radius))
    assert found.min() >= 0 and found.max() <= 255 and found.dtype == np.float32
    change = np.abs(found - images.astype(np.float32))
    assert change.max() <= radius + 1e-5
    assert change.max() > 0.9 * radius  # and it is used


def test_more_steps_and_larger_radii_hurt_more(world):
    clean = losses(world, world[1])
    for radius in (1, 4):
        one, many = (
            losses(world, attack(world, radius, s)) for s in (fgsm(radius), pgd(radius, 10))
        )
        assert (one >= clean - 1e-6).all() and many.mean() >= one.mean() - 1e-6
        assert one.mean() > clean.mean() + 0.01
    assert losses(world, attack(world, 4, fgsm(4))).mean() > one.mean() - 1e-6
    small, large = (losses(world, attack(world, r, pgd(r, 10))).mean() for r in (1, 4))
    assert large > small


def test_the_random_start_is_the_keys(world):
    settings = {**pgd(4.0, 1), "step_size": 0.0}
    one, same, other = (attack(world, 4, settings, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, same)
    assert np.abs(one - other).max() > 1
    spread = (one - world[1].astype(np.float32))[2:] / 4
    inside = (world[1][2:] > 4) & (world[1][2:] < 251)
    assert spread[inside].std() == pytest.approx(1 / np.sqrt(3), rel=0.1)  # uniform on [-1, 1]


def inputs(world, **more):
    weights, images, labels = world
    settings = {name: np.float32(value) for name, value in pgd(4, 5).items()}
    settings["steps"] = np.int32(5)
    number = np.arange(N, dtype=np.int32)
    return {"image": images, "label": labels, "number": number, "seed": np.uint32(0),
            "radius": np.float32(4), **settings, **more}  # fmt: skip


def test_attacks_on_a_zero_shot_classifier_and_on_the_same_scores_are_one(world):
    """Unit vectors whose products with the classes are the scores."""
    weights = world[0]

    def embed(params, x):
        out = scores(params, x) + 1  # black has scores of 0, which have no direction
        return out / jnp.linalg.norm(out, axis=-1, keepdims=True)

    functions = with_attacks({"embed_image": embed, "classify": lambda p, x: 5 * embed(p, x),
                                  "embed_text": None})  # fmt: skip
    added = {"attacked_embed_image", "attacked_classify"}
    assert set(functions) == added | {"embed_image", "classify", "embed_text"}
    zero_shot = jax.jit(functions["attacked_embed_image"])(
        weights,
        inputs(world, classes=np.eye(CLASSES, dtype=np.float32), logit_scale=np.float32(5)),
    )
    own = jax.jit(functions["attacked_classify"])(weights, inputs(world))
    np.testing.assert_allclose(zero_shot, own, atol=1e-4)
    assert np.abs(own - 5 * embed(weights, world[1].astype(np.float32))).max() > 0.05


def test_an_image_is_attacked_alike_in_any_batch(world):
    weights = world[0]
    attacked = jax.jit(with_attacks({"classify": scores})["attacked_classify"])
    everything = inputs(world)
    whole = attacked(weights, everything)
    part = {k: v[6:] if np.ndim(v) else v for k, v in everything.items()}
    np.testing.assert_allclose(attacked(weights, part), whole[6:], atol=1e-5)

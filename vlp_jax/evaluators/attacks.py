"""Adversarial attacks on the pixels of an image: FGSM and PGD, in the maximum norm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, Num, UInt8

from vlp_jax.objectives.base import Function, of_images

Scores = Callable[[Float[Array, "batch height width 3"]], Float[Array, "batch classes"]]
PREFIX = "attacked_"  # of the attacked function's name
ATTACKABLE = ("classify", "embed_image")
# Inputs of an attacked function that describe the attack.
SETTINGS = ("radius", "step_size", "steps", "random_start")


def attacked_images(
    scores: Scores,
    image: UInt8[Array, "batch height width 3"] | Float[Array, "batch height width 3"],
    label: Int[Array, " batch"],
    keys: Key[Array, " batch"],
    *,
    radius: float | Num[Array, ""],
    step_size: float | Num[Array, ""],
    steps: int | Int[Array, ""],
    random_start: bool | Float[Array, ""],
) -> Float[Array, "batch height width 3"]:
    """Changes images by at most `radius` so that the classifier is less sure of the true class.

    Each step follows the sign of the gradient of the cross-entropy of the true class. FGSM is one
    step of length `radius`, from the image itself (Goodfellow et al. 2015, "Explaining and
    Harnessing Adversarial Examples", 4). PGD takes several steps from a random point of the ball
    and projects each result into the ball (Madry et al. 2018, "Towards Deep Learning Models
    Resistant to Adversarial Attacks", 2.1).

    Args:
      scores: images -> logits of the classes. The logits of an image must depend on it alone.
      keys: random keys of the start, one for each image.
      radius, step_size: largest change of a value (the maximum norm) and length of a step, on the
        scale of 0 to 255.
      random_start: whether to start from a random point of the ball, or from the image.

    Returns:
      float32 values within the ball and within [0, 255]. They are not rounded.
    """
    image = image.astype(jnp.float32)
    low, high = jnp.maximum(image - radius, 0), jnp.minimum(image + radius, 255)

    def loss(x: Array) -> Array:
        log = jax.nn.log_softmax(scores(x).astype(jnp.float32))
        # A sum, not a mean: then each image has the gradient that it would have alone.
        return -jnp.take_along_axis(log, label[:, None], axis=1).sum()

    def step(_: Any, x: Array) -> Array:
        return jnp.clip(x + step_size * jnp.sign(jax.grad(loss)(x)), low, high)

    noise = jax.vmap(lambda key, x: jax.random.uniform(key, x.shape, minval=-1.0))(keys, image)
    # A factor and not a branch: FGSM and PGD are one compiled program.
    start = jnp.clip(image + jnp.float32(random_start) * radius * noise, low, high)
    return jax.lax.fori_loop(0, steps, step, start)


def with_attacks(functions: Mapping[str, Callable[..., Any]]) -> dict[str, Function]:
    """Adds attacked versions of the functions that classify, for `Robustness`.

    Each takes `(params, inputs)` and returns the scores [batch, classes] of the attacked images.
    Its inputs are `image`, `label`, `number` (the example's number in its split, for the random
    start), `seed` and `SETTINGS`. An attacked `embed_image` also takes `classes`, unit vectors
    [classes, dim], and `logit_scale`, the factor on the cosine similarity in the softmax.
    """

    def attacked(function: Callable[..., Array], embeds: bool) -> Callable[..., Array]:
        def run(params: Any, inputs: Mapping[str, Array]) -> Array:
            def scores(pixels: Array) -> Array:
                out = function(params, pixels).astype(jnp.float32)
                return inputs["logit_scale"] * out @ inputs["classes"].T if embeds else out

            base = jax.random.key(inputs["seed"])
            keys = jax.vmap(lambda n: jax.random.fold_in(base, n))(inputs["number"])
            settings = {name: inputs[name] for name in SETTINGS}
            label = inputs["label"].astype(jnp.int32)
            return scores(attacked_images(scores, inputs["image"], label, keys, **settings))

        return run

    attacks = {
        PREFIX + name: of_images(attacked(functions[name], name == "embed_image"), "scores")
        for name in ATTACKABLE
        if name in functions
    }
    return {**attacks, **functions}

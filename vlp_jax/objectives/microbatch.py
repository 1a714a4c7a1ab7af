"""Batches in parts, one after the other, so that the activations of one part are alive at a time.

What is computed does not change: a contrastive loss still sees every pair of the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.objectives.base import Metrics, Params

Fields = Any  # a pytree of arrays whose first dimension is the batch


def split(fields: Fields, parts: int) -> Fields:
    """[batch, ...] to [parts, batch / parts, ...]: part i has every `parts`-th example from i on.

    Neighbours go to different parts, so that each device keeps the examples it has.
    """

    def one(x: Array) -> Array:
        x = einops.rearrange(x, "(b m) ... -> m b ...", m=parts)
        return nn.with_logical_constraint(x, (None, "batch", *(None,) * (x.ndim - 2)))

    return jax.tree.map(one, fields)


def merge(fields: Fields) -> Fields:
    """The inverse of `split`."""

    def one(x: Array) -> Array:
        x = einops.rearrange(x, "m b ... -> (b m) ...")
        return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))

    return jax.tree.map(one, fields)


def embed_in_parts(
    embed: Callable[[Params, Fields, PRNGKeyArray], Fields],
    params: Params,
    fields: Fields,
    rng: PRNGKeyArray,
    parts: int,
) -> Fields:
    """`embed(params, fields, rng)` for an `embed` that treats each example for itself.

    With more than one part it costs a second forward pass: the first keeps the embeddings alone;
    once the loss has given their gradients, each part is embedded again and its gradient added up
    (Gao et al. 2021, "GradCache", 3.2; Pham et al. 2023, "BASIC", 4.2).
    """
    if parts == 1:
        return embed(params, fields, rng)
    again = jax.checkpoint(embed, prevent_cse=False)

    def part(_: None, xs: tuple[Fields, Array]) -> tuple[None, Fields]:
        fields, key = xs
        return None, again(params, fields, key)

    _, embeddings = jax.lax.scan(part, None, (split(fields, parts), jax.random.split(rng, parts)))
    return merge(embeddings)


def mean_over_parts(
    loss: Callable[[Params, Fields, PRNGKeyArray], tuple[Float[Array, ""], Metrics]],
    params: Params,
    fields: Fields,
    rng: PRNGKeyArray,
    parts: int,
) -> tuple[Float[Array, ""], Metrics]:
    """`loss(params, fields, rng)` for a `loss` that is a mean over the examples.

    The gradient of a part is computed right after its loss, so that nothing of it is kept and no
    forward pass is done twice.
    """
    if parts == 1:
        return loss(params, fields, rng)
    xs = (split(fields, parts), jax.random.split(rng, parts))

    def add(total: Any, one: Any) -> Any:
        return jax.tree.map(jnp.add, total, one)

    def run(function: Callable[..., Any], params: Params) -> Any:
        zero = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], xs)),
        )
        total, _ = jax.lax.scan(lambda sums, x: (add(sums, function(params, *x)), None), zero, xs)
        return total

    @jax.custom_vjp
    def mean(params: Params) -> tuple[Array, Metrics]:
        value, metrics = run(loss, params)
        return value / parts, metrics

    def forward(params: Params) -> tuple[tuple[Array, Metrics], Params]:
        (value, metrics), gradient = run(jax.value_and_grad(loss, has_aux=True), params)
        return (value / parts, metrics), jax.tree.map(lambda g: g / parts, gradient)

    def backward(gradient: Params, cotangents: tuple[Array, Any]) -> tuple[Params]:
        return (jax.tree.map(lambda g: g * cotangents[0], gradient),)

    mean.defvjp(forward, backward)
    return mean(params)

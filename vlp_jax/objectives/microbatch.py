"""Computes a batch in parts, so that only the activations of one part are in memory at a time.

The loss does not change: a contrastive loss still sees every pair of the whole batch, and a mean
over tokens is a mean over all tokens of the batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.objectives.base import Batch, Context, Examples, LossOutput, Objective, Params

Loss = Callable[[Params, Batch, Context], tuple[Float[Array, ""], LossOutput]]


def loss_in_parts(objective: Objective, parts: int) -> Loss:
    """Returns `objective.loss`, which computes `forward` for `parts` parts of the batch in turn."""
    if parts == 1:
        return objective.loss
    compute = _coupled if objective.couples_batch else _uncoupled

    def loss(params: Params, batch: Batch, context: Context) -> Any:
        batch = objective.draw(batch, context)  # whole, so the draws do not depend on `parts`
        return compute(objective, params, _Divided(batch, context, parts), context)

    return loss


class _Divided:
    """A batch split into parts for `jax.lax.scan`.

    Fields that are the same array are split once and remain the same array within a part.
    `shared_forward` recognizes shared inputs by identity.
    """

    def __init__(self, batch: Examples, context: Context, parts: int):
        leaves, self._structure = jax.tree.flatten(batch)
        different = {id(leaf): leaf for leaf in leaves}
        places = {key: place for place, key in enumerate(different)}
        self._places = [places[id(leaf)] for leaf in leaves]
        self._context = context
        self.batch = batch
        self.xs = (split(list(different.values()), parts), jax.random.split(context.rng, parts))

    def part(self, x: Any) -> tuple[Examples, Context]:
        """Returns one part of the batch and its context, from an element of `xs`."""
        fields, key = x
        batch = jax.tree.unflatten(self._structure, [fields[place] for place in self._places])
        return batch, dataclasses.replace(self._context, rng=key)


def split(fields: Examples, parts: int) -> Examples:
    """Reshapes [batch, ...] to [parts, batch / parts, ...]: part i has examples i, i + parts, ...

    A device holds a contiguous range of the batch. With every `parts`-th example, each part has an
    equal share of that range, and no example moves to another device.
    """

    def one(x: Array) -> Array:
        x = einops.rearrange(x, "(b m) ... -> m b ...", m=parts)
        return nn.with_logical_constraint(x, (None, "batch", *(None,) * (x.ndim - 2)))

    return jax.tree.map(one, fields)


def merge(fields: Examples) -> Examples:
    """Undoes `split`."""

    def one(x: Array) -> Array:
        x = einops.rearrange(x, "m b ... -> (b m) ...")
        return nn.with_logical_constraint(x, ("batch", *(None,) * (x.ndim - 1)))

    return jax.tree.map(one, fields)


def _coupled(objective: Objective, params: Params, divided: _Divided, context: Context) -> Any:
    """Computes a loss that couples examples, with a second forward pass.

    The first pass keeps only the results of `forward`, such as embeddings. The loss gives their
    gradients. Then each part is computed again, and its gradient of the parameters is added (Gao et
    al. 2021, "GradCache", 3.2; Pham et al. 2023, "BASIC", 4.2).
    """
    # jax.checkpoint does it: the scan saves no activation of a part, and the backward pass computes
    # the part again. Within a scan, the compiler cannot merge the two passes (prevent_cse).
    again = jax.checkpoint(
        lambda params, x: objective.forward(params, *divided.part(x)), prevent_cse=False
    )
    _, examples = jax.lax.scan(lambda _, x: (None, again(params, x)), None, divided.xs)
    return objective.reduce(params, merge(examples), context)


def _uncoupled(objective: Objective, params: Params, divided: _Divided, context: Context) -> Any:
    """Computes a loss that is a sum over examples, with one forward pass.

    The gradient of a part is computed right after its loss, so no activation outlives its part. A
    part's sums must be divided by the counts of the whole batch, which are known beforehand because
    counts depend on the batch alone.
    """
    # Looks like a forward pass of the whole batch, but only the counts are used: the compiler
    # removes everything else.
    fixed = jax.lax.stop_gradient(params)
    counts = jax.tree.map(jnp.sum, _counts(objective.forward(fixed, divided.batch, context)))

    def part(params: Params, x: Any) -> tuple[Array, Examples]:
        examples = objective.forward(params, *divided.part(x))
        # Counts that add up to those of the whole batch make `reduce` divide by them.
        spread = jax.tree.map(
            lambda total, count: jnp.full(count.shape, total / count.size),
            counts,
            _counts(examples),
        )
        return objective.reduce(params, _with_counts(examples, spread), context)[0], examples

    def finish(params: Params, examples: Examples) -> tuple[Array, LossOutput]:
        return objective.reduce(params, merge(examples), context)

    # If JAX differentiated the scan, it would keep the activations of all parts for the backward
    # pass. So `forward` below already computes the gradient, part by part.
    @jax.custom_vjp
    def loss(params: Params) -> tuple[Array, LossOutput]:
        _, examples = jax.lax.scan(lambda _, x: (None, part(params, x)[1]), None, divided.xs)
        return finish(params, examples)

    def forward(params: Params) -> tuple[tuple[Array, LossOutput], Params]:
        def one(total: Params, x: Any) -> tuple[Params, Examples]:
            gradient, examples = jax.grad(part, has_aux=True)(params, x)
            return jax.tree.map(jnp.add, total, gradient), examples

        gradient, examples = jax.lax.scan(one, jax.tree.map(jnp.zeros_like, params), divided.xs)
        return finish(params, examples), gradient

    def backward(gradient: Params, cotangents: tuple[Array, Any]) -> tuple[Params]:
        # cotangents[1] belongs to the metrics, which are not differentiated.
        return (jax.tree.map(lambda g: g * cotangents[0], gradient),)

    loss.defvjp(forward, backward)
    return loss(params)


def _is_pair(x: Any) -> bool:
    return isinstance(x, tuple)


def _counts(examples: Examples) -> Examples:
    """Returns the counts of metrics, given as pairs (sum, count)."""
    return jax.tree.map(lambda pair: pair[1], examples, is_leaf=_is_pair)


def _with_counts(examples: Examples, counts: Examples) -> Examples:
    return jax.tree.map(lambda pair, count: (pair[0], count), examples, counts, is_leaf=_is_pair)

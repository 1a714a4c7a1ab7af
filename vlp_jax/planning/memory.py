"""Bytes of a training state and of activations on a device, from shapes and shardings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import BatchSpec
from vlp_jax.parallel import rules
from vlp_jax.parallel.mesh import batch_shards
from vlp_jax.parallel.rules import Spread, spread
from vlp_jax.training.setup import Setup
from vlp_jax.training.state import PURPOSE_LOSS, TrainState, context_of, key_for


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The parts of a training state; averages and the objective's own are with `optimizer`."""

    params: Spread
    optimizer: Spread

    @property
    def device(self) -> int:
        """Bytes on a device, all parts together."""
        return self.params.per_device + self.optimizer.per_device

    @property
    def total(self) -> int:
        """Bytes of the whole state once."""
        return self.params.total + self.optimizer.total


def state_bytes(abstract: TrainState, mesh: Mesh) -> StateBytes:
    """Measures an abstract state."""
    # Whatever a restart needs besides parameters is charged to the optimizer.
    others = (abstract.step, abstract.opt_state, abstract.ema, abstract.objective)
    return StateBytes(spread(abstract.params, mesh), spread(others, mesh))


def activation_bytes(setup: Setup) -> int:
    """Estimates the bytes that a device keeps between the passes, for one microbatch.

    Every array counts that JAX's backward pass takes over from the forward pass and whose size
    follows the batch, spread over the devices that share a batch. A compiler may keep less: it can
    compute some of them again, or merge them. It may keep more: it pads. The axis `tensor` divides
    only some of them, and is left out.
    """
    parts = setup.config.microbatches
    objective = setup.objective.at(setup.costliest)
    # A device holds its own examples alone; along `tensor` devices share examples.
    shards = batch_shards(setup.mesh)
    spec = _resized(setup.batch_spec, setup.config.batch_size // parts)
    with rules.use_mesh(setup.mesh):
        kept = _residuals(objective, setup.abstract, spec)
        # Twice the batch tells which arrays follow it: weights that the backward pass keeps have
        # the same shape in both and are no activations.
        doubled = _resized(spec, 2 * setup.config.batch_size // parts)
        larger = _residuals(objective, setup.abstract, doubled)
    follow = (a for a, b in zip(kept, larger, strict=True) if a.shape != b.shape)
    return sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in follow) // shards


def _resized(spec: BatchSpec, batch_size: int) -> BatchSpec:
    return {
        name: jax.ShapeDtypeStruct((batch_size, *one.shape[1:]), one.dtype)
        for name, one in spec.items()
    }


def _residuals(objective: Objective, state: TrainState, spec: BatchSpec) -> list[Any]:
    def backward(state: TrainState, batch: Any) -> Any:
        context = context_of(state, key_for(0, 0, PURPOSE_LOSS))
        loss = lambda params: objective.loss(params, batch, context)  # noqa: E731
        # The function that `vjp` returns is a pytree whose leaves are the residuals.
        return jax.vjp(loss, state.params, has_aux=True)[1]

    return jax.tree.leaves(jax.eval_shape(backward, state, spec))

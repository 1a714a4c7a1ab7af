"""Several steps in one program: the host hands them to the devices together.

To start a program takes the host a time that grows with its arrays, some hundred microseconds for a
large model, and to take note of what it reports about as much. Where a step is shorter than this,
the devices wait for the host; where it is longer they never do, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.objectives.base import Batch, BatchSpec
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.training.state import TrainState
from vlp_jax.training.step import (
    CompiledStep,
    StepFunction,
    StepMetrics,
    abstract_batch,
    compile_for,
    compile_step,
    pack_metrics,
)


class SeveralMetrics:
    """The metrics of consecutive steps, in one array on the devices.

    Attributes:
      array: float32 [most, metrics, 2], in the order of the names; the first `count` rows hold.
      count: how many steps they are of.
    """

    def __init__(self, names: Sequence[str], array: jax.Array, count: int):
        self._names = tuple(names)
        self.array = array
        self.count = count

    def fetch(self) -> list[dict[str, tuple[float, float]]]:
        """(sum, count) by name, of each step, as Python numbers; waits for the devices."""
        rows = jax.device_get(self.array)[: self.count].tolist()
        return [{n: tuple(pair) for n, pair in zip(self._names, row, strict=True)} for row in rows]


jax.tree_util.register_pytree_node(
    SeveralMetrics,
    lambda metrics: ((metrics.array,), (metrics._names, metrics.count)),
    lambda fixed, leaves: SeveralMetrics(fixed[0], *leaves, fixed[1]),
)


class CompiledSteps:
    """Up to `most` steps as one program for the devices, which takes over the memory of the state.

    Attributes:
      program: what XLA made, for its text and its figures. What it says of a loop's body it says
        once, so its FLOPs are those of one step.
    """

    def __init__(self, program: jax.stages.Compiled, names: Sequence[str], most: int, mesh: Mesh):
        self.program = program
        self._names = tuple(names)
        self._most = most
        self._mesh = mesh
        self._counts: list[jax.Array] = []

    def __call__(
        self, state: TrainState, *batches: Batch
    ) -> tuple[TrainState, StepMetrics | SeveralMetrics]:
        """A step on each of the batches, in their order; it does not wait for the devices.

        Raises:
          ValueError: no batch, or more than it was compiled for.
        """
        count = len(batches)
        if not 0 < count <= self._most:
            raise ValueError(f"{count} batches for a program of 1 to {self._most} steps")
        if not self._counts:  # on the devices once, so that no step has to bring it there
            where = mesh_lib.replicated(self._mesh)
            every = [np.int32(number) for number in range(1, self._most + 1)]
            self._counts = [jax.device_put(number, where) for number in every]
        filled = batches + batches[-1:] * (self._most - count)
        state, array = self.program(state, self._counts[count - 1], filled)
        return state, SeveralMetrics(self._names, array, count)


def compile_steps(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh, most: int
) -> CompiledStep | CompiledSteps:
    """One program for any number of steps up to `most`; for 1 that of `compile_step`.

    The batches lie twice on the devices while it runs: as they came, and one after the other.
    """
    if most == 1:
        return compile_step(step, abstract, batch_spec, mesh)
    packed, names = pack_metrics(step)
    batch = abstract_batch(batch_spec, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def stack(*fields: jax.Array) -> jax.Array:
        spec = PartitionSpec(None, *mesh_lib.batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(jnp.stack(fields), NamedSharding(mesh, spec))

    def several(
        state: TrainState, count: jax.Array, batches: tuple[Batch, ...]
    ) -> tuple[TrainState, jax.Array]:
        stacked = jax.tree.map(stack, *batches)
        row = jax.eval_shape(packed, state, batches[0])[1]

        def one(number: jax.Array, carry: tuple[TrainState, jax.Array]) -> Any:
            state, rows = carry
            state, row = packed(state, jax.tree.map(lambda x: x[number], stacked))
            state = jax.lax.with_sharding_constraint(state, state_shardings)
            return state, rows.at[number].set(row)

        return jax.lax.fori_loop(0, count, one, (state, jnp.zeros((most, *row.shape), row.dtype)))

    count = jax.ShapeDtypeStruct((), jnp.int32, sharding=mesh_lib.replicated(mesh))
    program = compile_for(several, abstract, mesh, count, (batch,) * most)
    return CompiledSteps(program, names, most, mesh)

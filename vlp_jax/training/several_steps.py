"""Several steps in one program: the host hands them to the devices together.

To start a program takes the host a time that grows with its arrays, some hundred microseconds for a
large model, and to take note of what it reports a part of that. Where a step is shorter than this,
the devices wait for the host; where it is longer they never do, and nothing is gained.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
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
      array: float32 [steps, metrics, 2], in the order of the names.
    """

    def __init__(self, names: Sequence[str], array: jax.Array):
        self._names = tuple(names)
        self.array = array

    def fetch(self) -> list[dict[str, tuple[float, float]]]:
        """(sum, count) by name, of each step, as Python numbers; waits for the devices."""
        rows = jax.device_get(self.array).tolist()
        return [{n: tuple(pair) for n, pair in zip(self._names, row, strict=True)} for row in rows]


jax.tree_util.register_pytree_node(
    SeveralMetrics,
    lambda metrics: ((metrics.array,), metrics._names),
    lambda names, leaves: SeveralMetrics(names, *leaves),
)


class CompiledSteps:
    """A step, and `most` steps as one program, for the devices; they take over the state's memory.

    Attributes:
      single: the step by itself, for where fewer are left.
      program: what XLA made of `most` steps.
    """

    def __init__(
        self, single: CompiledStep, program: jax.stages.Compiled, names: Sequence[str], most: int
    ):
        self.single, self.program = single, program
        self._names = tuple(names)
        self._most = most

    def __call__(
        self, state: TrainState, *batches: Batch
    ) -> tuple[TrainState, StepMetrics | SeveralMetrics]:
        """A step on each of the batches, in their order; it does not wait for the devices.

        Raises:
          ValueError: neither one batch nor as many as it was compiled for.
        """
        if len(batches) == 1:
            return self.single(state, *batches)
        if len(batches) != self._most:
            raise ValueError(f"{len(batches)} batches for programs of 1 and of {self._most} steps")
        state, array = self.program(state, batches)
        return state, SeveralMetrics(self._names, array)


def compile_steps(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh, most: int
) -> CompiledStep | CompiledSteps:
    """The step as a program, and for `most` above 1 another of as many steps.

    That one is a loop whose number of rounds is known to the compiler: on a GPU the host would
    have to look at the end of each round otherwise. The batches lie twice on the devices while it
    runs: as they came, and one after the other.
    """
    single = compile_step(step, abstract, batch_spec, mesh)
    if most == 1:
        return single
    packed, names = pack_metrics(step)
    batch = abstract_batch(batch_spec, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def stack(*fields: jax.Array) -> jax.Array:
        spec = PartitionSpec(None, *mesh_lib.batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(jnp.stack(fields), NamedSharding(mesh, spec))

    def one(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, row = packed(state, batch)
        return jax.lax.with_sharding_constraint(state, state_shardings), row

    def several(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, jax.Array]:
        return jax.lax.scan(one, state, jax.tree.map(stack, *batches))

    program = compile_for(several, abstract, mesh, (batch,) * most)
    return CompiledSteps(single, program, names, most)

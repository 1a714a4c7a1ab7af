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
    PackedMetrics,
    StepFunction,
    StepMetrics,
    abstract_batch,
    compile_for,
    compile_step,
    pack_metrics,
)


@jax.tree_util.register_pytree_node_class
class SeveralMetrics(PackedMetrics):
    """The metrics of consecutive steps: the array is [steps, metrics, 2]."""

    def fetch(self) -> list[dict[str, tuple[float, float]]]:
        """(sum, count) by name, of each step, as Python numbers; waits for the devices."""
        return [self._named(rows) for rows in jax.device_get(self.array).tolist()]


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


StepProgram = CompiledStep | CompiledSteps  # called with the state and one batch or several


def compile_steps(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh, most: int
) -> StepProgram:
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

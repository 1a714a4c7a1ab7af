"""Compiles several training steps into one program, which the host dispatches at once.

Starting a program costs the host some hundred microseconds for a large model; the cost grows with
the number of its arrays. Where a step is shorter than this, the devices would wait for the host.
Where a step is longer they never wait, and several steps per program gain nothing.
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
        """Waits for the devices and returns, for each step, (sum, count) by name."""
        return [self._named(rows) for rows in jax.device_get(self.array).tolist()]


class CompiledSteps:
    """A program of one step and a program of `most` steps. A call donates the state's memory.

    Attributes:
      single: the program of one step, for where fewer than `most` steps are left.
      program: the XLA executable of `most` steps.
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
        """Dispatches one step for each batch, in order, without waiting for the devices.

        Raises:
          ValueError: the number of batches is neither 1 nor `most`.
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
    """Compiles the step, and for `most` > 1 also a program of `most` steps.

    The second program is a scan. While it runs, the devices hold its batches twice: as arguments,
    and stacked for the scan.
    """
    single = compile_step(step, abstract, batch_spec, mesh)
    if most == 1:
        return single
    packed, names = pack_metrics(step)
    batch = abstract_batch(batch_spec, mesh)
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)

    def stack(*fields: jax.Array) -> jax.Array:
        # The new first dimension counts steps: it is not split, since every device runs every step.
        spec = PartitionSpec(None, *mesh_lib.batch_sharding(mesh).spec)
        return jax.lax.with_sharding_constraint(jnp.stack(fields), NamedSharding(mesh, spec))

    def one(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, row = packed(state, batch)
        # The carry of a scan must keep its sharding, or XLA reshards the state in every round.
        return jax.lax.with_sharding_constraint(state, state_shardings), row

    def several(state: TrainState, batches: Sequence[Batch]) -> tuple[TrainState, jax.Array]:
        # A scan has a trip count that the compiler knows. On a GPU, a while loop would wait for the
        # host at the end of each round.
        return jax.lax.scan(one, state, jax.tree.map(stack, *batches))

    program = compile_for(several, abstract, mesh, (batch,) * most)
    return CompiledSteps(single, program, names, most)

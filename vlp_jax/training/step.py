"""The training step: one pure function of state and batch, compiled alone or with others."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import Batch, BatchSpec, LossOutput, Metrics, Params
from vlp_jax.objectives.microbatch import loss_in_parts
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training import param_groups
from vlp_jax.training.state import PURPOSE_LOSS, TrainState, context_of, key_for
from vlp_jax.training.step_rules import Average, Guard, choose

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# A step that returns its metrics as one array, for `PackedMetrics`.
PackedStep = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    average: Average,
    frozen: Sequence[str],
    guard: Guard,
    microbatches: int,
    resting: frozenset[str],
    begins: int,
) -> StepFunction:
    """Makes the function from (state, batch i) to (next state, metrics of batch i).

    A skipped step advances the step count and the learning-rate schedule, and changes nothing else.

    Args:
      frozen: regular expressions of the paths of parameters that are not differentiated.
      resting: paths of parameters that no loss of this phase reads, and that do not change.
      begins: the first step of this phase, where the guard's loss statistics start anew.
    """
    compute_loss = loss_in_parts(objective, microbatches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        context = context_of(state, key_for(seed, state.step, PURPOSE_LOSS))
        trained, fixed = param_groups.split(state.params, frozen)

        def loss(trained: Params) -> tuple[jax.Array, LossOutput]:
            return compute_loss(param_groups.merge(trained, fixed), batch, context)

        (value, output), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        # Weight decay and momentum would move resting parameters, although their gradient is 0.
        hold = functools.partial(param_groups.hold, resting)
        updates = hold(updates, jax.tree.map(jnp.zeros_like, updates))
        opt_state = hold(opt_state, state.opt_state)
        updated = hold(optax.apply_updates(trained, updates), trained)
        params = param_groups.merge(updated, fixed)
        ema = hold(average(state.ema, updated, state.step), state.ema)
        grad_norm = optax.tree.norm(grads)
        stats = choose(state.step == begins, guard.init(), state.guard) if begins else state.guard
        apply, stats = guard(stats, value, grad_norm)
        # Select, not branch: skipped steps are rare, and a select fuses with the update.
        before = (state.params, state.opt_state, state.ema, state.objective)
        after = (params, opt_state, ema, output.state)
        params, selected, ema, objective_state = choose(apply, after, before)
        opt_state = _advance_schedules(selected, opt_state)
        figures = {
            "learning_rate": schedule(state.step),
            "grad_norm": grad_norm,
            "update_norm": optax.tree.norm(updates),
            "param_norm": optax.tree.norm(params),
            "skipped": 1 - apply.astype(jnp.float32),
        }
        metrics = {**output.metrics, **{n: (x, jnp.float32(1)) for n, x in figures.items()}}
        state = TrainState(state.step + 1, params, opt_state, ema, stats, objective_state)
        return state, metrics

    return step


def _advance_schedules(opt_state: Any, updated: Any) -> Any:
    """Takes the counts of learning-rate schedules from `updated`: a skipped step counts too."""

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def pick(part: Any, counted: Any) -> Any:
        return counted if is_schedule(part) else part

    return jax.tree.map(pick, opt_state, updated, is_leaf=is_schedule)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SeveralMetrics:
    """The metrics of consecutive steps, (sum, count) by name, packed in one array on the devices.

    A step has about twenty metrics. Each array that a program returns costs the host time, both
    when the program starts and when the array is fetched, so all metrics share one array.

    Attributes:
      array: float32 [steps, metrics, 2], in the order of the names.
    """

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    array: jax.Array

    def fetch(self) -> list[dict[str, tuple[float, float]]]:
        """Waits for the devices and returns, for each step, (sum, count) by name."""
        steps = jax.device_get(self.array).tolist()
        return [{n: tuple(row) for n, row in zip(self.names, rows, strict=True)} for rows in steps]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class StepMetrics(Mapping[str, tuple[Any, Any]]):
    """The metrics of one step, [metrics, 2]. Reading one waits for the step and fetches all."""

    names: tuple[str, ...] = dataclasses.field(metadata={"static": True})
    array: jax.Array

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self.names:
            raise KeyError(name)
        total, count = jax.device_get(self.array)[self.names.index(name)]
        return total, count

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)

    def fetch(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of every metric as Python numbers, in one transfer."""
        pairs = jax.device_get(self.array).tolist()
        return {name: tuple(pair) for name, pair in zip(self.names, pairs, strict=True)}


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """A step compiled for the devices. A call donates the memory of the state it is given.

    Attributes:
      program: the XLA executable, for its text and its cost figures.
      names: the metrics, in the order of its array.
    """

    program: jax.stages.Compiled
    names: tuple[str, ...]

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Dispatches the step and returns without waiting for the devices."""
        state, array = self.program(state, batch)
        return state, StepMetrics(self.names, array)


def compile_step(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh
) -> CompiledStep:
    """Compiles the step for the mesh, from shapes alone."""
    packed, names = _pack_metrics(step)
    program = _compile_for(packed, abstract, mesh, abstract_batch(batch_spec, mesh))
    return CompiledStep(program, tuple(names))


def _pack_metrics(step: StepFunction) -> tuple[PackedStep, list[str]]:
    """Packs the metrics in one array; the list of their names fills when the step is traced."""
    names: list[str] = []

    def packed(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, metrics = step(state, batch)
        names[:] = metrics  # a side effect of tracing: names are known only once the loss ran
        pairs = [jnp.stack([jnp.float32(x) for x in pair]) for pair in metrics.values()]
        return state, jnp.stack(pairs)

    return packed, names


def abstract_batch(batch_spec: BatchSpec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns shapes, dtypes and shardings of a batch on `mesh`."""
    sharding = mesh_lib.batch_sharding(mesh)
    return {
        name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=sharding)
        for name, spec in batch_spec.items()
    }


def _compile_for(
    function: Callable[..., tuple[TrainState, jax.Array]],
    abstract: TrainState,
    mesh: Mesh,
    *arguments: Any,
) -> jax.stages.Compiled:
    """Compiles (state, arguments) -> (state, metrics); a call donates the state's memory."""
    # Without out_shardings XLA may choose another sharding for the new state. Then its memory could
    # not be reused, and the second call would not accept the state.
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(
        function,
        donate_argnums=0,
        out_shardings=(state_shardings, mesh_lib.replicated(mesh)),
    )
    # The model's sharding constraints name axes, which the mesh resolves while they are traced.
    with rules.use_mesh(mesh):
        return jitted.lower(abstract, *arguments).compile()


# Several steps in one program. Starting a program costs the host some hundred microseconds for a
# large model, more with more arrays. Where a step is shorter, the devices would wait for the host.


@dataclasses.dataclass(frozen=True)
class CompiledSteps:
    """A program of one step and a program of `most` steps. A call donates the state's memory.

    Attributes:
      single: the program of one step, for where fewer than `most` steps are left.
      program: the XLA executable of `most` steps.
    """

    single: CompiledStep
    program: jax.stages.Compiled
    most: int

    def __call__(
        self, state: TrainState, *batches: Batch
    ) -> tuple[TrainState, StepMetrics | SeveralMetrics]:
        """Dispatches one step for each of 1 or `most` batches, without waiting for the devices."""
        if len(batches) == 1:
            return self.single(state, *batches)
        if len(batches) != self.most:
            raise ValueError(f"{len(batches)} batches for programs of 1 and of {self.most} steps")
        state, array = self.program(state, batches)
        return state, SeveralMetrics(self.single.names, array)


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
    packed, _ = _pack_metrics(step)
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

    program = _compile_for(several, abstract, mesh, (batch,) * most)
    return CompiledSteps(single, program, most)

"""The training step: one pure function of state and batch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import Batch, BatchSpec, LossOutput, Metrics, Params
from vlp_jax.objectives.microbatch import loss_in_parts
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training import param_groups
from vlp_jax.training.average import NO_AVERAGE, Average
from vlp_jax.training.guard import NO_SPIKE_RULE, Guard, choose
from vlp_jax.training.state import PURPOSE_LOSS, TrainState, context_of, key_for

StepFunction = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
# A step that returns its metrics as one array, for `PackedMetrics`.
PackedStep = Callable[[TrainState, Batch], tuple[TrainState, jax.Array]]


def make_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int,
    average: Average = NO_AVERAGE,
    frozen: Sequence[str] = (),
    guard: Guard = NO_SPIKE_RULE,
    microbatches: int = 1,
    resting: frozenset[str] = frozenset(),
    begins: int = 0,
) -> StepFunction:
    """Makes the function from (state, batch i) to (next state, metrics of batch i).

    The metrics are the objective's and those named in `_step_metrics`. A skipped step advances the
    step count and the learning-rate schedule, and changes nothing else.

    Args:
      average: the moving average of the parameters to keep in the state.
      frozen: regular expressions of the paths of parameters that never change. The loss is not
        differentiated with respect to them, so their part of the backward pass costs nothing.
      guard: decides which steps are skipped.
      microbatches: parts in which a batch is computed, one after the other.
      resting: paths of parameters that no loss of this phase reads. They and their optimizer state
        do not change.
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
        norms = optax.tree.norm(updates), optax.tree.norm(params)
        step_metrics = _step_metrics(schedule(state.step), apply, grad_norm, *norms)
        state = TrainState(state.step + 1, params, opt_state, ema, stats, objective_state)
        return state, {**output.metrics, **step_metrics}

    return step


def _step_metrics(
    learning_rate: Any, apply: Any, grad_norm: Any, update_norm: Any, param_norm: Any
) -> Metrics:
    """The metrics that every step has, whatever its objective."""
    one = jnp.float32(1)
    return {
        "learning_rate": (learning_rate, one),
        "grad_norm": (grad_norm, one),
        "update_norm": (update_norm, one),
        "param_norm": (param_norm, one),
        "skipped": (1 - apply.astype(jnp.float32), one),
    }


def _advance_schedules(opt_state: Any, updated: Any) -> Any:
    """Returns `opt_state` with the step counts of learning-rate schedules taken from `updated`.

    A skipped step counts for the schedule too. Otherwise the rate would lag behind the run.
    """

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def pick(part: Any, counted: Any) -> Any:
        return counted if is_schedule(part) else part

    return jax.tree.map(pick, opt_state, updated, is_leaf=is_schedule)


class PackedMetrics:
    """The metrics of a step, (sum, count) by name, packed in one array on the devices.

    A step has about twenty metrics. Each array that a program returns costs the host time, both
    when the program starts and when the array is fetched, so all metrics share one array.

    Attributes:
      array: float32 [..., metrics, 2], in the order of the names.
    """

    def __init__(self, names: Sequence[str], array: jax.Array):
        self._names = tuple(names)
        self.array = array

    def tree_flatten(self) -> tuple[tuple[jax.Array], tuple[str, ...]]:
        """Returns (the array, the names), for `jax.tree_util`."""
        return (self.array,), self._names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], leaves: Sequence[Any]) -> Self:
        """Builds the metrics from the results of `tree_flatten`."""
        return cls(names, *leaves)

    def _named(self, rows: Sequence[Sequence[float]]) -> dict[str, tuple[float, float]]:
        return {name: tuple(row) for name, row in zip(self._names, rows, strict=True)}


@jax.tree_util.register_pytree_node_class
class StepMetrics(PackedMetrics, Mapping[str, tuple[Any, Any]]):
    """The metrics of one step. Reading a metric waits for the step and fetches all metrics."""

    def __getitem__(self, name: str) -> tuple[Any, Any]:
        if name not in self._names:
            raise KeyError(name)
        total, count = jax.device_get(self.array)[self._names.index(name)]
        return total, count

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def fetch(self) -> dict[str, tuple[float, float]]:
        """Returns (sum, count) of every metric as Python numbers, in one transfer."""
        return self._named(jax.device_get(self.array).tolist())


class CompiledStep:
    """A step compiled for the devices. A call donates the memory of the state it is given.

    Attributes:
      program: the XLA executable, for its text and its cost figures.
    """

    def __init__(self, program: jax.stages.Compiled, names: Sequence[str]):
        self.program = program
        self._names = tuple(names)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """Dispatches the step and returns without waiting for the devices."""
        state, array = self.program(state, batch)
        return state, StepMetrics(self._names, array)


def compile_step(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh
) -> CompiledStep:
    """Compiles the step for the mesh, from shapes alone."""
    packed, names = pack_metrics(step)
    batch = abstract_batch(batch_spec, mesh)
    return CompiledStep(compile_for(packed, abstract, mesh, batch), names)


def pack_metrics(step: StepFunction) -> tuple[PackedStep, list[str]]:
    """Returns `step` with its metrics packed in one array, and the list of their names.

    The list is empty until the returned step is traced.
    """
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


def compile_for(
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

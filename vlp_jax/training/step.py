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
# With the metrics as the array of `PackedMetrics`.
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
    """(state before batch i, batch i) -> (state before batch i + 1, metrics of batch i).

    The metrics are the objective's, the learning rate, the global norms of gradient, update and
    parameters, and whether the step was skipped. A skipped step leaves all of the state as it is,
    but for its number and that of the learning rate's schedule: the next one is of the next batch.

    Args:
      average: of the parameters.
      frozen: regular expressions of the paths of parameters that stay as they are. The loss is not
        differentiated by these, so that their part of the backward pass is not computed.
      guard: decides which steps are skipped.
      microbatches: parts in which a batch is computed, one after the other.
      resting: paths of parameters that no loss of these steps reads: they and the optimizer's
        state of them stay as they are.
      begins: the first of these steps, whose loss is another one, so that the guard forgets.
    """
    compute_loss = loss_in_parts(objective, microbatches)

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        context = context_of(state, key_for(seed, state.step, PURPOSE_LOSS))
        trained, fixed = param_groups.split(state.params, frozen)

        def loss(trained: Params) -> tuple[jax.Array, LossOutput]:
            return compute_loss(param_groups.merge(trained, fixed), batch, context)

        (value, output), grads = jax.value_and_grad(loss, has_aux=True)(trained)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        hold = functools.partial(param_groups.hold, resting)
        updates = hold(updates, jax.tree.map(jnp.zeros_like, updates))
        opt_state = hold(opt_state, state.opt_state)
        moved = hold(optax.apply_updates(trained, updates), trained)
        params = param_groups.merge(moved, fixed)
        ema = hold(average(state.ema, moved, state.step), state.ema)
        grad_norm = optax.tree.norm(grads)
        memory = choose(state.step == begins, guard.init(), state.guard) if begins else state.guard
        ahead, memory = guard(memory, value, grad_norm)
        before = (state.params, state.opt_state, state.ema, state.objective)
        after = (params, opt_state, ema, output.state)
        params, chosen, ema, kept = choose(ahead, after, before)
        opt_state = _with_schedules_of(chosen, opt_state)
        norms = optax.tree.norm(updates), optax.tree.norm(params)
        own = _step_metrics(schedule(state.step), ahead, grad_norm, *norms)
        state = TrainState(state.step + 1, params, opt_state, ema, memory, kept)
        return state, {**output.metrics, **own}

    return step


def _step_metrics(
    learning_rate: Any, ahead: Any, grad_norm: Any, update_norm: Any, param_norm: Any
) -> Metrics:
    """The metrics of a step that no objective knows of."""
    one = jnp.float32(1)
    return {
        "learning_rate": (learning_rate, one),
        "grad_norm": (grad_norm, one),
        "update_norm": (update_norm, one),
        "param_norm": (param_norm, one),
        "skipped": (1 - ahead.astype(jnp.float32), one),
    }


def _with_schedules_of(opt_state: Any, ahead: Any) -> Any:
    """`opt_state` with the steps that `ahead` has counted for its learning rates.

    A step that is skipped counts for them: else the rate would lag behind the run.
    """

    def is_schedule(part: Any) -> bool:
        return isinstance(part, optax.ScaleByScheduleState)

    def pick(part: Any, counted: Any) -> Any:
        return counted if is_schedule(part) else part

    return jax.tree.map(pick, opt_state, ahead, is_leaf=is_schedule)


class PackedMetrics:
    """Metrics, (sum, count) by name, in one array on the devices; a pytree of that array.

    Each array that a program gives or the host fetches costs the host some time: a step has some
    twenty numbers.

    Attributes:
      array: float32 [..., metrics, 2], in the order of the names.
    """

    def __init__(self, names: Sequence[str], array: jax.Array):
        self._names = tuple(names)
        self.array = array

    def tree_flatten(self) -> tuple[tuple[jax.Array], tuple[str, ...]]:
        """(the array, the names)."""
        return (self.array,), self._names

    @classmethod
    def tree_unflatten(cls, names: tuple[str, ...], leaves: Sequence[Any]) -> Self:
        """The reverse of `tree_flatten`."""
        return cls(names, *leaves)

    def _named(self, rows: Sequence[Sequence[float]]) -> dict[str, tuple[float, float]]:
        return {name: tuple(row) for name, row in zip(self._names, rows, strict=True)}


@jax.tree_util.register_pytree_node_class
class StepMetrics(PackedMetrics, Mapping[str, tuple[Any, Any]]):
    """The metrics of a step. Reading one of them waits for the step, and fetches all of them."""

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
        """All of them, as Python numbers, fetched once."""
        return self._named(jax.device_get(self.array).tolist())


class CompiledStep:
    """A step as a program for the devices. It takes over the memory of the state.

    Attributes:
      program: what XLA made, for its text and its figures.
    """

    def __init__(self, program: jax.stages.Compiled, names: Sequence[str]):
        self.program = program
        self._names = tuple(names)

    def __call__(self, state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        """The step; it does not wait for the devices."""
        state, array = self.program(state, batch)
        return state, StepMetrics(self._names, array)


def compile_step(
    step: StepFunction, abstract: TrainState, batch_spec: BatchSpec, mesh: Mesh
) -> CompiledStep:
    """The step compiled for the mesh before its first batch."""
    packed, names = pack_metrics(step)
    batch = abstract_batch(batch_spec, mesh)
    return CompiledStep(compile_for(packed, abstract, mesh, batch), names)


def pack_metrics(step: StepFunction) -> tuple[PackedStep, list[str]]:
    """`step` with its metrics in one array (`PackedMetrics`), and their names once it is traced."""
    names: list[str] = []

    def packed(state: TrainState, batch: Batch) -> tuple[TrainState, jax.Array]:
        state, metrics = step(state, batch)
        names[:] = metrics
        pairs = [jnp.stack([jnp.float32(x) for x in pair]) for pair in metrics.values()]
        return state, jnp.stack(pairs)

    return packed, names


def abstract_batch(batch_spec: BatchSpec, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch on `mesh`."""
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
    """(state, arguments) -> (state, metrics) as a program that takes over the state's memory."""
    state_shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    jitted = jax.jit(
        function,
        donate_argnums=0,
        out_shardings=(state_shardings, mesh_lib.replicated(mesh)),
    )
    with rules.use_mesh(mesh):
        return jitted.lower(abstract, *arguments).compile()

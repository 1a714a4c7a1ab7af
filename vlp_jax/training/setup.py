"""Builds objective, optimizer, shapes and shardings of a run from its config. Reads no workdir."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.data.pipeline import MultiPipeline
from vlp_jax.errors import UserError
from vlp_jax.models.attention import ONLY_ON
from vlp_jax.objectives import Objective, make_objective
from vlp_jax.objectives.base import BatchSpec, check_reads
from vlp_jax.objectives.flops import count_flops
from vlp_jax.observe.throughput import StepClock
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training import param_groups
from vlp_jax.training.optimizer import make_optimizer, make_schedule
from vlp_jax.training.state import (
    PURPOSE_INIT,
    PURPOSE_LOSS,
    TrainState,
    abstract_state,
    context_of,
    init_state,
    key_for,
)
from vlp_jax.training.step import StepFunction, StepProgram, compile_steps, make_step
from vlp_jax.training.step_rules import Average, Guard
from vlp_jax.training.when import EverySteps, Units

MOST_STEPS = 2**31 - 1  # the state counts steps in 32 bits


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that follows from a run's config, data and devices before any array is made.

    Attributes:
      batch_spec: shape and dtype of each field of a global batch.
      abstract: shapes, dtypes and shardings of the state.
      units: turns durations into steps.
    """

    config: ConfigDict
    mesh: Mesh
    objective: Objective
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    batch_spec: BatchSpec
    abstract: TrainState
    units: Units

    @property
    def phases(self) -> tuple[int, ...]:
        """The first step of each phase: 0, and the steps at which losses begin or end."""
        return (0, *(step for step in self.objective.switches() if step < self.units.total_steps))

    @property
    def costliest(self) -> int:
        """The first step of the phase whose steps have the most FLOPs."""
        # A run of one phase need not count FLOPs, which takes a trace of the model.
        return max(self.phases, key=self.flops_by_phase.get) if len(self.phases) > 1 else 0

    @property
    def step(self) -> StepFunction:
        """The pure training step of the costliest phase, not yet compiled."""
        return self.step_of(self.costliest)

    def step_of(self, phase: int) -> StepFunction:
        """Makes the pure training step of the phase that begins at step `phase`."""
        objective = self.objective.at(phase)
        return make_step(
            objective,
            self.optimizer,
            self.schedule,
            seed=self.config.seed,
            average=self.average,
            frozen=self.config.optimizer.frozen,
            guard=self.guard,
            microbatches=self.config.microbatches,
            resting=self._resting(objective),
            begins=phase,
        )

    def _resting(self, objective: Objective) -> frozenset[str]:
        """The paths of the parameters that the objective of a phase does not read."""
        # Objectives are frozen dataclasses: equal ones read the same parameters.
        if objective == self.objective:
            return frozenset()
        key = key_for(0, 0, PURPOSE_INIT)
        with rules.use_mesh(self.mesh):
            read = nn.unbox(jax.eval_shape(lambda: objective.init(key, self.batch_spec)))
        paths = param_groups.flatten(self.abstract.params).keys()
        return frozenset(paths - param_groups.flatten(read).keys())

    @property
    def forward_flops(self) -> float:
        """FLOPs of the loss of a global batch in the costliest phase."""
        return self.flops_by_phase[self.costliest]

    @functools.cached_property
    def flops_by_phase(self) -> dict[int, float]:
        """First step of a phase -> FLOPs of the loss of a global batch; a multiply-add is 2."""

        def count(objective: Objective) -> float:
            def loss(state: TrainState, batch: Any) -> Any:
                context = context_of(state, key_for(0, 0, PURPOSE_LOSS))
                return objective.loss(state.params, batch, context)

            return count_flops(loss, self.abstract, self.batch_spec).total

        with rules.use_mesh(self.mesh):
            return {phase: count(self.objective.at(phase)) for phase in self.phases}

    def compile(self, phase: int | None = None) -> StepProgram:
        """Compiles `config.steps_per_dispatch` steps of a phase; None for the costliest."""
        step = self.step_of(self.costliest if phase is None else phase)
        most = self.config.steps_per_dispatch
        return compile_steps(step, self.abstract, self.batch_spec, self.mesh, most)

    def losses_of(self, phase: int) -> str:
        """Names the losses of a phase, for the log."""
        return " and ".join(self.objective.at(phase).parts())

    @property
    def average(self) -> Average:
        """The moving average of the parameters that `config.optimizer` asks for."""
        return Average.of(self.config.optimizer, self.units)

    @property
    def guard(self) -> Guard:
        """The rule that decides which steps are skipped."""
        return Guard.of(self.config.guard)

    def fresh_state(self) -> TrainState:
        """Makes the initial state from the config's seed, in place on the devices."""
        arguments = self.objective, self.optimizer, self.batch_spec, self.abstract
        return init_state(*arguments, self.config.seed, self.average, self.guard)

    def every(self, duration: ConfigDict, where: str) -> EverySteps:
        """Returns a test that is true at each multiple of `duration` and at the end of the run."""
        period = self.units.steps(duration, where)
        return EverySteps(period, last=self.units.total_steps)

    def log_when(self) -> Callable[[int], bool]:
        """Returns a test that is true for the steps to log: every n-th from 0 on, and the last."""
        # A period of 0 means the end alone elsewhere; here it would divide by zero.
        period = max(1, self.units.steps(self.config.log.every, "config.log.every"))
        last = self.units.total_steps - 1
        return lambda step: step % period == 0 or step == last


class Phases:
    """Returns the program of a step; sets the FLOPs and tells the losses where a phase begins.

    All programs (`compile_phases`) are compiled before the first step, so that one that does not
    fit fails at the start.
    """

    def __init__(
        self,
        setup: Setup,
        programs: Mapping[int, StepProgram],
        clock: StepClock,
        tell: Callable[[str], None],
    ):
        self._setup, self._programs = setup, programs
        self._clock, self._tell = clock, tell
        self._now: int | None = None

    def __call__(self, step: int) -> StepProgram:
        """Returns the program for batch `step`."""
        phase = max(begin for begin in self._programs if begin <= step)
        if phase != self._now:
            self._now, setup = phase, self._setup
            self._clock.count_flops(setup.flops_by_phase[phase] / setup.config.batch_size)
            if step == phase > 0:  # else the run begins, or resumes within a phase
                self._tell(f"step {phase:,}  the loss is now: {setup.losses_of(phase)}")
        return self._programs[phase]


def compile_phases(setup: Setup, first_step: int) -> dict[int, StepProgram]:
    """Compiles the programs of the phases that are not over before `first_step`."""
    ends = (*setup.phases[1:], setup.units.total_steps)
    return {
        phase: setup.compile(phase)
        for phase, end in zip(setup.phases, ends, strict=True)
        # A run that resumes at its very end takes no step, yet is set up like every other run.
        if end > first_step or end == setup.units.total_steps
    }


def make_setup(
    config: ConfigDict,
    mesh: Mesh,
    tokenizer: Any,
    batch_spec: dict[str, tuple[tuple[int, ...], Any]],
    epoch_examples: int | None,
) -> Setup:
    """Builds the `Setup` of the run that `config` describes.

    `batch_spec` is field -> (shape, dtype) of a global batch; `epoch_examples` the training set's.

    Raises:
      UserError: the config does not fit the devices, the data or itself.
    """
    check_batch_size(config, mesh)
    check_dispatch(config)
    check_attention(config.objective, mesh)
    units = make_units(config, epoch_examples)
    objective = make_objective(config.objective, tokenizer, units.steps)
    check_phases(objective, units.total_steps)
    optimizer = make_optimizer(config.optimizer, units)
    average, guard = Average.of(config.optimizer, units), Guard.of(config.guard)
    spec = {name: jax.ShapeDtypeStruct(*value) for name, value in batch_spec.items()}
    try:
        check_reads(objective, spec)
        abstract = abstract_state(objective, optimizer, spec, mesh, average, guard)
    except ValueError as error:
        shapes = {name: shape for name, (shape, _) in batch_spec.items()}
        raise UserError(f"the model does not fit the batch {shapes}: {error}") from error
    param_groups.check_groups(config.optimizer, abstract.params)
    average.check(abstract.params)
    schedule = make_schedule(config.optimizer, units)
    return Setup(config, mesh, objective, optimizer, schedule, spec, abstract, units)


def check_phases(objective: Objective, total_steps: int) -> None:
    """Raises UserError if a step has no loss, or if a loss has weight 0 at every step."""
    seen: set[str] = set()
    for step in (0, *objective.switches()):
        if step < total_steps:
            try:
                seen |= objective.at(step).parts().keys()
            except ValueError as error:
                raise UserError(f"config.objective.parts: {error}") from error
    for name in sorted(objective.parts().keys() - seen):
        raise UserError(
            f"config.objective.parts.{name}.weight is 0 in all of the {total_steps:,} steps"
        )


def check_attention(objective: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the config asks for an attention kernel that these devices cannot run."""
    platform = mesh.devices.flat[0].platform
    for section in [objective, *(objective.get("parts") or {}).values()]:
        name = section.get("attention")
        if platform not in ONLY_ON.get(name, (platform,)):
            raise UserError(
                f"config.objective.attention {name} runs on {ONLY_ON[name][0].upper()} alone, and "
                f"these devices are {platform.upper()}; take --config.objective.attention=xla"
            )


def check_batch_size(config: ConfigDict, mesh: Mesh) -> None:
    """Raises UserError if the mesh and the microbatches do not divide the global batch."""
    mesh_lib.check_batch_size(config.batch_size, mesh)
    parts = config.microbatches
    if parts < 1 or config.batch_size % parts:
        raise UserError(
            f"config.microbatches {parts} does not divide config.batch_size {config.batch_size}"
        )
    # Each microbatch is spread over the same devices as the whole batch.
    what = f"a microbatch (config.batch_size / config.microbatches {parts}) of"
    mesh_lib.check_batch_size(config.batch_size // parts, mesh, what)


def check_dispatch(config: ConfigDict) -> None:
    """Raises UserError if `config.steps_per_dispatch` is below 1."""
    if config.steps_per_dispatch < 1:
        raise UserError(
            f"config.steps_per_dispatch must be at least 1, not {config.steps_per_dispatch}"
        )


def make_units(config: ConfigDict, epoch_examples: int | None) -> Units:
    """Makes the converter from durations to steps; UserError if the run is no or too many steps."""
    units = Units(config.batch_size, epoch_examples)
    total = units.steps(config.duration, "config.duration")
    if total < 1:
        raise UserError("config.duration is less than one step")
    if total > MOST_STEPS:
        raise UserError(
            f"config.duration is {total:,} steps of {config.batch_size} examples, and a step is "
            f"counted in 32 bits, up to {MOST_STEPS:,}; set a larger config.batch_size"
        )
    return dataclasses.replace(units, total_steps=total)


def make_pipeline(config: ConfigDict, tokenizer: Any) -> MultiPipeline:
    """Opens the training input of this process."""
    return MultiPipeline(
        config.data,
        config.extra_data,
        tokenizer,
        batch_size=config.batch_size,
        seed=config.seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )

"""The phases of a run, each with a program of its own. A phase begins where a loss begins or ends.

All programs are compiled before the first step. So a program that does not fit the devices fails
at the start, and not after most of the run.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from vlp_jax.observe.throughput import StepClock
from vlp_jax.training.setup import Setup
from vlp_jax.training.several_steps import StepProgram


class Phases:
    """Returns the program of a step, and calls `begin` when a phase begins.

    Args:
      programs: first step of a phase -> its program.
      begin: called with the first step of the phase and the current step. The two differ when a
        run resumes within a phase.
    """

    def __init__(self, programs: Mapping[int, StepProgram], begin: Callable[[int, int], None]):
        self._programs = dict(sorted(programs.items()))
        self._begin = begin
        self._now: int | None = None

    def __call__(self, step: int) -> StepProgram:
        """Returns the program for batch `step`."""
        begins = list(self._programs)
        phase = begins[bisect.bisect_right(begins, step) - 1]
        if phase != self._now:
            self._now = phase
            self._begin(phase, step)
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


def describe_losses(setup: Setup, phase: int) -> str:
    """Names the losses of a phase, for the log."""
    return " and ".join(setup.objective.at(phase).parts())


def begin_phase(
    setup: Setup, clock: StepClock, tell: Callable[[str], None]
) -> Callable[[int, int], None]:
    """Returns the `begin` of `Phases`: it sets the FLOPs of a step and logs the losses."""

    def begin(phase: int, step: int) -> None:
        clock.count_flops(setup.flops_by_phase[phase] / setup.config.batch_size)
        if step == phase > 0:
            losses = describe_losses(setup, phase)
            tell(f"step {phase:,}  the loss is now: {losses}")

    return begin

"""Phases of a run: from each step on at which a loss begins or ends, the program is another one.

All of them are compiled before the first step: one that does not fit the devices is found then, and
not after most of the run.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping

from vlp_jax.observe.throughput import StepClock
from vlp_jax.training.setup import Setup
from vlp_jax.training.several_steps import StepProgram


class Phases:
    """Hands out the program of a step, and tells when it is another one than that of the last.

    Args:
      programs: the first step of a phase -> its program.
      begin: is called with the first step of a phase, and with the step, where a program is
        another one than before.
    """

    def __init__(self, programs: Mapping[int, StepProgram], begin: Callable[[int, int], None]):
        self._programs = dict(sorted(programs.items()))
        self._begin = begin
        self._now: int | None = None

    def __call__(self, step: int) -> StepProgram:
        """The program of batch `step`."""
        begins = list(self._programs)
        phase = begins[bisect.bisect_right(begins, step) - 1]
        if phase != self._now:
            self._now = phase
            self._begin(phase, step)
        return self._programs[phase]


def compile_phases(setup: Setup, first_step: int) -> dict[int, StepProgram]:
    """The programs of the phases that are not over before `first_step`."""
    ends = (*setup.phases[1:], setup.units.total_steps)
    return {
        phase: setup.compile(phase)
        for phase, end in zip(setup.phases, ends, strict=True)
        if end > first_step or end == setup.units.total_steps
    }


def describe_losses(setup: Setup, phase: int) -> str:
    """The losses of a phase, for the log."""
    return " and ".join(setup.objective.at(phase).parts())


def begin_phase(
    setup: Setup, clock: StepClock, tell: Callable[[str], None]
) -> Callable[[int, int], None]:
    """What is to be done when a phase begins: the FLOPs of a step are others, and it is told."""

    def begin(phase: int, step: int) -> None:
        clock.count_flops(setup.flops_by_phase[phase] / setup.config.batch_size)
        if step == phase > 0:
            losses = describe_losses(setup, phase)
            tell(f"step {phase:,}  from here on the loss is that of {losses}")

    return begin

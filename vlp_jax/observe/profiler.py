"""A trace of a few steps for XProf, TensorBoard's profile tab or Perfetto."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any, Self

import jax
from etils import epath

from vlp_jax.errors import UserError

PAUSE_CAUSE = "profiling"


class TraceSignal:
    """Tells whether SIGUSR1 came, which ends a process otherwise: enter it early, leave it late."""

    def __init__(self) -> None:
        self._came = False
        self._number = getattr(signal, "SIGUSR1", None)  # not every system has it

    def __enter__(self) -> Self:
        if self._number:
            self._before = signal.signal(self._number, self._receive)
        return self

    def __exit__(self, *exception: object) -> None:
        if self._number:
            signal.signal(self._number, self._before)

    def take(self) -> bool:
        """Whether the signal came since the last call."""
        came, self._came = self._came, False
        return came

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._came = True


class Profiler:
    """Traces the steps `steps` into `directory`, and some more whenever it is asked to.

    As a context manager it also writes a trace within which the run ends or fails. A trace that
    cannot be taken or written is told, and ends no run.

    Args:
        steps: numbers of the first and the last step to trace, as given to `step`; None for none.
        directory: where jax.profiler puts plugins/profile/<time>/.
        requested: whether a trace was asked for since the last call. It begins with the next step;
            a request that comes while a trace is taken is dropped.
        steps_on_request: steps of such a trace.
        say: takes a line for the log.
        pause: charges the time of beginning and writing a trace to a cause.

    Raises:
        UserError: the last step is before the first.
    """

    def __init__(
        self,
        steps: tuple[int, int] | None,
        directory: epath.PathLike,
        *,
        requested: Callable[[], bool] = lambda: False,
        steps_on_request: int = 5,
        say: Callable[[str], None] = lambda line: None,
        pause: Callable[[str], AbstractContextManager[None]] = lambda cause: (
            contextlib.nullcontext()
        ),
    ):
        if steps:
            check_steps(*steps)
        self._steps = range(steps[0], steps[1] + 1) if steps else range(0)
        self._directory = os.fspath(directory)
        self._requested, self._steps_on_request = requested, steps_on_request
        self._say, self._pause = say, pause
        self._tracing: range | None = None
        self._newest = 0
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def step(self, step: int, wait_for: Any = (), count: int = 1) -> None:
        """Begins or ends a trace, if due just before the `count` steps from `step` on.

        `wait_for` are arrays of the step before, such as the state. JAX runs ahead of the device:
        the trace begins and ends when they are computed, so that it holds whole steps.
        """
        self._end_annotation()
        asked = self._requested()
        if self._tracing is not None and step not in self._tracing:
            jax.block_until_ready(wait_for)
            self.close()
        elif asked and self._tracing is not None:
            self._say("a trace is being taken already: the signal is dropped")
            asked = False
        if self._tracing is None:
            if step in self._steps:
                self._start(range(step, self._steps.stop), wait_for)
            elif asked:
                self._start(range(step, step + self._steps_on_request), wait_for)
        if self._tracing is not None:
            self._newest = step + count - 1
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def close(self) -> None:
        """Ends the trace if one is being taken; harmless otherwise."""
        self._end_annotation()
        if self._tracing is None:
            return
        first, self._tracing = self._tracing.start, None
        try:
            with self._pause(PAUSE_CAUSE):
                jax.profiler.stop_trace()
        except (OSError, RuntimeError) as error:  # jax.errors.JaxRuntimeError is the latter
            self._say(f"warning: no trace of steps {first} to {self._newest}: {error}")
            return
        self._say(
            f"trace of steps {first} to {self._newest} in {self._directory}: look at it with "
            f"`xprof {self._directory}` or `tensorboard --logdir {self._directory}`, or open its "
            "*.trace.json.gz in https://ui.perfetto.dev"
        )

    def _start(self, steps: range, wait_for: Any) -> None:
        jax.block_until_ready(wait_for)
        options = jax.profiler.ProfileOptions()
        # To note each Python call makes Python several times as slow, and the trace untrue.
        options.python_tracer_level = 0
        try:
            with self._pause(PAUSE_CAUSE):
                jax.profiler.start_trace(self._directory, profiler_options=options)
        except (OSError, RuntimeError) as error:
            self._steps = range(0)  # or every one of these steps would say so
            self._say(f"warning: no trace of steps {steps.start} to {steps.stop - 1}: {error}")
            return
        self._tracing = steps
        self._say(f"tracing steps {steps.start} to {steps.stop - 1}")

    def _end_annotation(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None


def check_steps(first: int, last: int) -> None:
    """Raises UserError unless `first` to `last` are steps."""
    if last < first:
        raise UserError(f"profiler: last step {last} is before first step {first}: swap them")
    if first < 0:
        raise UserError(f"profiler: first step {first} is negative")


def parse_steps(text: str) -> tuple[int, int]:
    """Parses "10:15" into (10, 15); UserError for anything else."""
    first, colon, last = text.partition(":")
    if not (colon and first.isdecimal() and last.isdecimal()):
        raise UserError(
            f"--profile {text}: give the first and the last step, as in --profile 10:15"
        )
    check_steps(int(first), int(last))
    return int(first), int(last)

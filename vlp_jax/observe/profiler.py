"""A trace of a few steps for Perfetto, XProf or TensorBoard's profile tab."""

from __future__ import annotations

import os
from types import TracebackType
from typing import Any, Self

import jax
from etils import epath

from vlp_jax.errors import UserError


class NullProfiler:
    """Traces nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def step(self, step: int, wait_for: Any = ()) -> None:
        del step, wait_for

    def close(self) -> None: ...


class Profiler:
    """Traces the steps from `first` to `last`, both included, into `directory`.

    Leave out the first steps of a run: they hold the compilation. As a context manager it writes
    the trace also when the run ends, or fails, within the traced steps.

    Args:
        first, last: numbers of the steps, as given to `step`.
        directory: where jax.profiler puts plugins/profile/<time>/.

    Raises:
        UserError: `last` is before `first`.
    """

    def __init__(self, first: int, last: int, directory: epath.PathLike):
        if last < first:
            raise UserError(f"profiler: last step {last} is before first step {first}: swap them")
        self._first = first
        self._last = last
        self._directory = os.fspath(directory)
        self._tracing = False
        self._annotation: jax.profiler.StepTraceAnnotation | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def step(self, step: int, wait_for: Any = ()) -> None:
        """Says that step `step` is about to begin.

        Args:
            step: its number.
            wait_for: arrays of the step before, e.g. the state. JAX runs ahead of the device: the
                trace begins and ends when they are computed, so it holds whole steps and no others.
        """
        self._end_annotation()
        traced = self._first <= step <= self._last
        if traced and not self._tracing:
            jax.block_until_ready(wait_for)
            jax.profiler.start_trace(self._directory)
            self._tracing = True
        elif not traced and self._tracing:
            jax.block_until_ready(wait_for)
            self.close()
        if traced:
            self._annotation = jax.profiler.StepTraceAnnotation("train", step_num=step)
            self._annotation.__enter__()

    def close(self) -> None:
        """Ends the trace if one is being taken; harmless otherwise."""
        self._end_annotation()
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()

    def _end_annotation(self) -> None:
        if self._annotation is not None:
            self._annotation.__exit__(None, None, None)
            self._annotation = None

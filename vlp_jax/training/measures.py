"""Measurements of a run beside the speed of its steps, and the summary at its end."""

from __future__ import annotations

import contextlib
import gc
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Self

import jax
from etils import epath
from ml_collections import ConfigDict

from vlp_jax.errors import UserError, first_line
from vlp_jax.files import write_whole
from vlp_jax.observe.accelerators import largest, memory_metrics
from vlp_jax.observe.compilation import Compiled, CompileWatch, describe
from vlp_jax.observe.goodput import (
    GOODPUT_FILE,
    Heartbeat,
    OwnTime,
    RunLedger,
    goodput_metrics,
)
from vlp_jax.observe.profiler import Profiler, TraceSignal, check_steps
from vlp_jax.observe.progress import NullProgress, Progress
from vlp_jax.observe.stragglers import ProcessSpeed, StragglerWatch, spread
from vlp_jax.observe.summary import SUMMARY_FILE, RunSummary
from vlp_jax.observe.throughput import StartupClock, StepClock
from vlp_jax.parallel import agreement

LEDGER_SECONDS = 30.0  # between two writes of goodput.json: what a kill can leave uncounted


class NullMeasures:
    """Measures nothing."""

    def scalars(self, step: int, speed: Mapping[str, float]) -> Mapping[str, float]:
        del step, speed
        return {}

    def saved(self, step: int) -> None: ...
    def collect_garbage(self, step: int) -> None: ...
    def note(self, label: str, value: str | float) -> None: ...


class ScheduledCollection:
    """Collects garbage before the steps that are multiples of `every`, and at no other time.

    Python collects once enough objects were made, so at different steps on different processes,
    and each time all of them wait for the slow one. This context manager switches that off. It also
    freezes the objects that exist on entry, so that later collections skip them and are short.

    Args:
      every: steps between collections; 0 leaves it to Python.
      pause: charges the time within to a cause.
    """

    def __init__(self, every: int, pause: Callable[[str], contextlib.AbstractContextManager[None]]):
        self._every = every
        self._pause = pause
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self._every:
            if gc.isenabled():
                gc.disable()
                self._undo.callback(gc.enable)
            if not gc.get_freeze_count():  # else the exit would unfreeze another caller's objects
                with self._pause("garbage collection"):
                    gc.collect()
                gc.freeze()
                self._undo.callback(gc.unfreeze)
        return self

    def __exit__(self, *exception: object) -> None:
        self._undo.close()

    def __call__(self, step: int) -> None:
        """Collects if it is due before batch `step`."""
        if self._every and step and step % self._every == 0:
            with self._pause("garbage collection"):
                gc.collect()


# Nothing in here may end a run: a file that cannot be written is a warning.
class Measures:
    """Measures time by cause, memory, compilation and stragglers, and writes the summary.

    Enter it early and leave it late, so that time before and after the loop is counted. Then call,
    in this order, `begin`, `compiling_step`, `use` and `training`. On leaving, process 0 prints and
    writes the summary if `training` has begun. `startup` counts the time up to `use`.
    """

    def __init__(
        self,
        config: ConfigDict,
        workdir: epath.Path,
        startup: StartupClock,
        progress: Progress | NullProgress,
    ):
        self._config, self._workdir = config, workdir
        self._startup, self._progress = startup, progress
        self._clock: StepClock | None = None
        self._stack = contextlib.ExitStack()
        self._request = TraceSignal()
        self._compile_watch = CompileWatch(self._charge_compilation)
        self._step_compiled, self._step_seconds = Compiled(), 0.0
        self._told_step, self._compiled_between_steps = False, 0
        self._ledger = RunLedger(workdir / GOODPUT_FILE, self._own, progress.print)
        self._heartbeat: Heartbeat | None = None
        self._stragglers = StragglerWatch()
        self._memory: dict[str, float] = {}
        self._first_step = self._total_steps = 0
        self._trained = False
        self._notes: dict[str, str | float] = {}
        self._collection: Callable[[int], None] = lambda step: None

    def __enter__(self) -> Self:
        self._stack.enter_context(self._request)
        self._stack.enter_context(self._compile_watch)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._stack:
            if self._heartbeat is None:
                return
            # Before the heartbeat ends: its last call writes the outcome to the file.
            self._ledger.end("complete" if error is None else first_line(error))
            self._heartbeat.__exit__()
            if self._trained:
                self._tell_summary("complete" if error is None else first_line(error))

    def begin(self, first_step: int, total_steps: int) -> None:
        """Continues the ledger of the run, which this process takes up at `first_step`."""
        self._first_step, self._total_steps = first_step, total_steps
        if jax.process_index() == 0:
            self._ledger.begin(first_step)
            self._heartbeat = Heartbeat(self._ledger.write, LEDGER_SECONDS).__enter__()
            self._heartbeat.soon()

    @contextlib.contextmanager
    def compiling_step(self) -> Iterator[None]:
        """Wraps the compilation of the training step."""
        before, begin = self._compile_watch.so_far(), time.perf_counter()
        yield
        self._step_compiled = self._compile_watch.so_far() - before
        self._step_seconds = time.perf_counter() - begin
        self._progress.print(f"compiled {describe(self._step_compiled, self._step_seconds)}")

    def use(self, clock: StepClock) -> StepClock:
        """Lets `clock` count the time from here, where the clock of the start-up ends."""
        self._clock = clock
        return clock

    def profiler(self) -> Profiler:
        """Makes what traces the steps of `config.profile`, and some on SIGUSR1; after `use`."""
        own, count = jax.process_index(), jax.process_count()

        def print_as_process(line: str) -> None:
            print(f"process {own}: {line}", file=sys.stderr, flush=True)

        folder = self._workdir / "profile"
        return Profiler(
            profile_steps(self._config),
            # Processes that share a host would write the same file.
            folder / f"process_{own}" if count > 1 else folder,
            requested=self._request.take,
            steps_on_request=self._config.profile.steps_on_signal,
            say=self._progress.print if own == 0 else print_as_process,
            pause=self._clock.paused,
        )

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wraps the loop; time after it is waiting for the last checkpoint."""
        self._trained = True
        every = self._config.garbage_collection_every
        try:
            with ScheduledCollection(every, self._clock.paused) as self._collection:
                yield
        finally:
            self._clock.finish()

    def collect_garbage(self, step: int) -> None:
        """Collects Python's garbage if that is due before batch `step`; within `training`."""
        self._collection(step)

    def saved(self, step: int) -> None:
        """Takes note that the state before batch `step` was handed over to be saved."""
        if self._heartbeat is not None:
            self._ledger.saved(step)
            self._heartbeat.soon()

    def scalars(self, step: int, speed: Mapping[str, float]) -> dict[str, float]:
        """Returns goodput, memory, compilation and stragglers of a logged step on process 0.

        Every process must call it, with its `StepClock.summary`.
        """
        # Not through the devices: a collective would wait for the step under way.
        own = {"host": socket.gethostname(), "speed": dict(speed), "memory": memory_metrics()}
        rows = agreement.to_first(own)
        if rows is None:
            return {}
        self._memory = largest(row["memory"] for row in rows)
        compiled, step = self._compile_watch.so_far(), {}
        if not self._told_step:  # at the first logged step of a start alone
            self._told_step = True
            step["compile/step_seconds"] = self._step_seconds
            step["compile/step_from_cache"] = float(self._step_compiled.from_cache())
        return {
            **goodput_metrics(self._ledger.now().seconds),
            **self._memory,
            **self._spread([ProcessSpeed.of(r["host"], r["speed"]) for r in rows if r["speed"]]),
            "compile/programs": compiled.programs,
            "compile/seconds": compiled.seconds,
            "compile/between_steps": self._compiled_between_steps,
            **step,
        }

    def note(self, label: str, value: str | float) -> None:
        """Adds a row to the summary, or replaces it."""
        self._notes[label] = value

    def _spread(self, speeds: list[ProcessSpeed]) -> dict[str, float]:
        if len(speeds) < 2 or len(speeds) < jax.process_count():
            return {}
        line = self._stragglers.look(speeds, time.monotonic())
        if line:
            self._progress.print(line)
        return spread(speeds)

    def _own(self) -> OwnTime:
        if self._clock is None:
            return OwnTime(self._startup.causes(), 0)
        return OwnTime(self._clock.goodput(), self._clock.steps_done)

    def _charge_compilation(self, seconds: float, name: str) -> None:
        if self._clock is None:
            return  # a phase of the start-up has it
        self._clock.compiled(seconds)
        # Until the first logged step programs may compile, and evaluations compile their own in a
        # pause.
        if self._told_step and not self._clock.pausing:
            self._compiled_between_steps += 1
            self.note("programs compiled between steps", self._compiled_between_steps)
            self._progress.print(
                f"warning: {name} was compiled between two steps, in {seconds:.1f} s; after the "
                "first logged step nothing should be: look for a shape or a constant that changes"
            )

    def _tell_summary(self, outcome: str) -> None:
        workdir, path = self._workdir, self._workdir / SUMMARY_FILE
        summary = RunSummary(
            outcome=outcome,
            first_step=self._first_step,
            last_step=self._first_step + self._clock.steps_done,
            total_steps=self._total_steps,
            examples=self._clock.examples_done,
            speed=self._clock.overall(),
            peak=self._clock.peak,
            step_compiled=self._step_compiled,
            step_seconds=self._step_seconds,
            compiled=self._compile_watch.so_far(),
            cache=jax.config.jax_compilation_cache_dir,
            memory=largest([self._memory, memory_metrics()]),
            seconds=self._clock.goodput(),
            run=self._ledger.now(),
            notes=self._notes,
            files={
                "metrics": str(workdir / "metrics.jsonl"),
                "checkpoints": str(workdir / "checkpoints"),
                "this summary": str(path),
            },
        )
        self._progress.print(summary.text())
        try:
            write_whole(path, summary.to_json())
        except Exception as error:  # whatever an object store raises; the run is over anyway
            self._progress.print(f"warning: {path} cannot be written ({error})")


def profile_steps(config: ConfigDict) -> tuple[int, int] | None:
    """Returns the first and last step that `config.profile` traces, or None; UserError for half."""
    first, last = config.profile.first, config.profile.last
    if config.profile.steps_on_signal < 1:
        raise UserError("config.profile.steps_on_signal must be at least 1")
    if first is None and last is None:
        return None
    if first is None or last is None:
        raise UserError("config.profile needs both first and last")
    check_steps(first, last)
    return first, last


def take_profile_flag(config: ConfigDict, steps: tuple[int, int] | None) -> None:
    """Puts the steps of `--profile FIRST:LAST` in `config.profile`; UserError if it has others."""
    if steps is None:
        return
    named = (config.profile.first, config.profile.last)
    if named != (None, None) and named != steps:
        raise UserError(
            f"--profile {steps[0]}:{steps[1]} contradicts config.profile, which has first="
            f"{named[0]} and last={named[1]}: give one of them"
        )
    config.profile.first, config.profile.last = steps

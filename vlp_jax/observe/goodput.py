"""Time of a run by cause, over all its processes: WORKDIR/goodput.json."""

from __future__ import annotations

import bisect
import dataclasses
import json
import math
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

from etils import epath

from vlp_jax.files import write_whole

GOODPUT_FILE = "goodput.json"
FORMAT = 1
MAX_MARKS = 256  # keeps the file below 10 kB, however often a run is saved

USEFUL, LOST, DOWN = "useful", "lost work", "down"
# The order of tables. A cause that is not in this list comes before "lost work" and "down".
CAUSES = (USEFUL, "start", "compile", "data wait", "checkpoint", "evaluation")


@dataclasses.dataclass(frozen=True)
class OwnTime:
    """Seconds by cause and steps of this process since it started."""

    seconds: Mapping[str, float]
    steps: int


@dataclasses.dataclass
class RunTime:
    """The time of a run up to `alive_at`. The seconds sum up to what passed since `began_at`.

    Attributes:
      began_at: Unix time at which the first process started.
      alive_at: Unix time of the last sign of life.
      starts: how often the run was started.
      seconds: by cause. "useful" is the time of the steps that the newest state consists of. The
        time of steps that a restart repeated is "lost work".
      step: steps that the newest state consists of.
      steps_done: all steps that were done, lost ones included.
      steps_lost: steps that a restart repeated.
      marks: (step, useful seconds of the steps before it), ascending, for saved steps.
      ended: how the last process ended; None while it runs, and if it was killed.
    """

    began_at: float
    alive_at: float
    starts: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    step: int = 0
    steps_done: int = 0
    steps_lost: int = 0
    marks: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    ended: str | None = None

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Reads what `to_json` wrote; ValueError if the text is no such record."""
        try:
            record = json.loads(text)
            if record.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            time_of_run = cls(**record)
            time_of_run.seconds = {str(k): float(v) for k, v in time_of_run.seconds.items()}
            time_of_run.marks = [(int(step), float(s)) for step, s in time_of_run.marks]
            numbers = [time_of_run.began_at, time_of_run.alive_at, *time_of_run.seconds.values()]
            numbers += [seconds for _, seconds in time_of_run.marks]
            counts = (time_of_run.starts, time_of_run.step, time_of_run.steps_done)
            whole = all(isinstance(n, int) for n in (*counts, time_of_run.steps_lost))
            if not whole or not all(math.isfinite(n) for n in numbers):
                raise ValueError("a number in it is none")
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"it lacks {error}") from error
        return time_of_run

    def to_json(self) -> str:
        """Writes one JSON object, so that a torn file is no JSON."""
        return json.dumps({"format": FORMAT, **dataclasses.asdict(self)}, allow_nan=False) + "\n"

    def restart(self, step: int, started_at: float) -> None:
        """Takes note of a process that started at `started_at` (Unix time) from `step`."""
        self.starts += 1
        self.ended = None
        # A clock that was set back would make the time in between negative.
        self._add(DOWN, max(started_at - self.alive_at, 0.0))
        if step < self.step:
            known_from = self.marks[0][0] if self.marks else 0
            useful = self.seconds.get(USEFUL, 0.0)
            kept = self._useful_before(step)
            self._add(LOST, useful - kept)
            self.seconds[USEFUL] = kept
            self.steps_lost += self.step - max(step, known_from)
        else:
            # A checkpoint may be newer than the last sign of life.
            self.steps_done += step - self.step
        self.step = step
        self.marks = [mark for mark in self.marks if mark[0] < step]
        self.mark()

    def mark(self) -> None:
        """Keeps the useful seconds up to `step`, to which a restart may return."""
        if self.marks and self.marks[-1][0] >= self.step:
            return
        self.marks.append((self.step, self.seconds.get(USEFUL, 0.0)))
        if len(self.marks) > MAX_MARKS:
            # The older ones are thinned out, not forgotten: a run may be set back far.
            del self.marks[1 : MAX_MARKS // 2 : 2]

    def _useful_before(self, step: int) -> float:
        """Estimates the useful seconds before `step`; between two marks, in proportion."""
        points = [*self.marks, (self.step, self.seconds.get(USEFUL, 0.0))]
        after = bisect.bisect_left(points, step, key=lambda point: point[0])
        (right, more) = points[after]
        if right == step or after == 0:
            return more if right == step else 0.0
        left, less = points[after - 1]
        return less + (more - less) * (step - left) / (right - left)

    def _add(self, cause: str, seconds: float) -> None:
        self.seconds[cause] = self.seconds.get(cause, 0.0) + seconds


class RunLedger:
    """Adds the time of this process to the time of the run, and keeps both in a file.

    No error of the file ends a run: an unreadable file is counted anew, and one that cannot be
    written is warned of once.

    Args:
      path: of goodput.json, in a folder that exists.
      own: returns the time of this process so far; called from any thread.
      warn: takes a line for the user.
    """

    def __init__(
        self,
        path: epath.Path,
        own: Callable[[], OwnTime],
        warn: Callable[[str], None],
        time_fn: Callable[[], float] = time.time,
    ):
        self._path, self._own, self._warn, self._time = path, own, warn, time_fn
        self._warned = False
        self._lock = threading.Lock()
        self._before = RunTime(0.0, 0.0)  # at the start of this process
        self._marks: list[tuple[int, float]] = []
        self._ended: str | None = None

    def begin(self, step: int) -> None:
        """Reads the file and goes on from `step`."""
        started_at = self._time() - sum(self._own().seconds.values())
        before = self._read(step)
        if before is None:
            before = RunTime(began_at=started_at, alive_at=started_at, step=step)
        before.restart(step, started_at)
        self._before = before
        self._marks = before.marks

    def saved(self, step: int) -> None:
        """Takes note that exactly the steps before `step` are done, and that it is being saved."""
        with self._lock:
            now = self._now()
            now.step = step
            now.mark()
            self._marks = now.marks

    def end(self, how: str) -> None:
        """Keeps how this process ends, for the next write."""
        self._ended = how

    def now(self) -> RunTime:
        """Returns the time of the run up to now."""
        with self._lock:
            return self._now()

    def write(self) -> None:
        """Writes the file, whole or not at all. Does not raise."""
        try:
            write_whole(self._path, self.now().to_json())
        except Exception as error:  # whatever an object store raises
            if not self._warned:
                self._warned = True
                self._warn(
                    f"warning: {self._path} cannot be written ({error}); the run goes on, but a "
                    "restart will not know the time that was spent since"
                )

    def _now(self) -> RunTime:
        own, before = self._own(), self._before
        seconds = dict(before.seconds)
        for cause, value in own.seconds.items():
            seconds[cause] = seconds.get(cause, 0.0) + value
        return dataclasses.replace(
            before,
            alive_at=self._time(),
            seconds=seconds,
            step=before.step + own.steps,
            steps_done=before.steps_done + own.steps,
            marks=list(self._marks),
            ended=self._ended,
        )

    def _read(self, step: int) -> RunTime | None:
        """Reads the file; None without one, with a warning unless the run is new."""
        try:
            if self._path.exists():
                return RunTime.from_json(self._path.read_text())
            problem = "it is not there"
        except Exception as error:  # whatever an object store raises; not UTF-8; not a RunTime
            problem = str(error)
        else:
            if not step:
                return None
        self._warn(
            f"warning: {self._path} does not tell where the time of this run went so far "
            f"({problem}); it is counted anew from step {step:,}"
        )
        return None


class Heartbeat:
    """Calls `function` in a thread of its own: every `interval` seconds, and after `soon`.

    A slow disk or object store thus costs the loop nothing. As a context manager it ends with one
    last call, for which it waits at most `patience` seconds. `function` must not raise.
    """

    def __init__(self, function: Callable[[], None], interval: float, patience: float = 30.0):
        self._function, self._interval, self._patience = function, interval, patience
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def soon(self) -> None:
        """Asks for a call now. Several requests before it begins are one."""
        self._wake.set()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ending = True
        self._wake.set()
        self._thread.join(self._patience)

    def _run(self) -> None:
        while True:
            self._wake.wait(self._interval)
            self._wake.clear()
            last = self._ending  # read before the call: what is asked for during it is not lost
            self._function()
            if last:
                return


def in_order(seconds: Mapping[str, float]) -> dict[str, float]:
    """Orders `seconds` as a table: useful first, the time between processes last."""
    more = [cause for cause in seconds if cause not in (*CAUSES, LOST, DOWN)]
    return {c: seconds[c] for c in (*CAUSES, *more, LOST, DOWN) if c in seconds}


def goodput_metrics(seconds: Mapping[str, float]) -> dict[str, Any]:
    """Returns `goodput/useful_fraction`, in [0, 1], and `goodput/CAUSE_seconds` by cause."""
    total = sum(seconds.values())
    named = {f"goodput/{c.replace(' ', '_')}_seconds": s for c, s in in_order(seconds).items()}
    return {"goodput/useful_fraction": seconds.get(USEFUL, 0.0) / total if total else 0.0, **named}

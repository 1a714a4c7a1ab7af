"""The progress line of a run: live on a terminal, now and then in a log file."""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import time
from collections.abc import Callable, Iterator
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

_REDRAW_SECONDS = 0.1  # ten redraws a second look continuous; more only cost time
_RECENT_UPDATES = 50
_BAR_WIDTHS = (10, 40)  # a bar shorter than ten cells says nothing


class NullProgress:
    """Shows nothing: for every process but the first, and for library use."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None: ...

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        del step, loss, examples_per_second

    def print(self, message: str) -> None:
        del message

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        yield


class Progress:
    """The progress line of a run of `total` steps.

    On a terminal it is one line, redrawn in place, that gives up its bar, the speed, the
    description, the percentage and the time left, in this order, where the window is narrow.
    Elsewhere (a log file, a pipe) it is a plain line at the first update, at the last step, and
    every `interval` seconds in between.

    The time left comes from the pace of recent updates. The time up to the first update, where
    compilation falls, and time inside `paused` do not count.

    Args:
        stream: where to write; stderr by default, so that stdout stays free for results.
        width: columns of the terminal; None asks the terminal, at every redraw.
    """

    def __init__(
        self,
        total: int,
        description: str = "",
        *,
        interval: float = 10.0,
        stream: TextIO | None = None,
        time_fn: Callable[[], float] = time.monotonic,
        width: int | None = None,
    ):
        self._total, self._description, self._interval = total, description, interval
        self._stream = sys.stderr if stream is None else stream
        self._time = time_fn
        self._started = time_fn()
        self._pace = _Pace(time_fn)
        self._parts: dict[str, str] = {}
        self._fraction, self._shown_at, self._stale = 0.0, -math.inf, False
        self._live: Live | None = None
        if self._stream.isatty():
            console = Console(file=self._stream, force_terminal=True, width=width)
            # Redrawn by update() alone: a refresh thread would compete with the loop for the GIL.
            self._live = Live(console=console, auto_refresh=False, get_renderable=self._render)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Leaves the last state as an ordinary line, also when the run failed."""
        if self._stale:
            self._show()
        if self._live is not None:
            # A run that fails before its first step should not leave an empty line behind.
            self._live.transient = not self._parts
            self._live.stop()

    def update(self, step: int, loss: float, examples_per_second: float) -> None:
        """Shows that `step` steps are done; NaN stands for a speed that is not known yet."""
        self._pace.add(step)
        self._fraction = min(step / self._total, 1.0) if self._total else 1.0
        if step >= self._total:
            remaining = f"took {format_duration(self._time() - self._started)}"
        else:
            left = self._pace.seconds_for(self._total - step)
            remaining = "" if left is None else f"left {format_duration(left)}"
        ordinary = not math.isfinite(loss) or loss == 0 or 1e-3 <= abs(loss) < 1e5
        self._parts = {
            "description": self._description,
            "step": f"step {step:,}/{self._total:,}",
            "percent": f"{self._fraction:.0%}",
            "loss": f"loss {loss:.3f}" if ordinary else f"loss {loss:.2e}",
            "speed": _format_speed(examples_per_second),
            "left": remaining,
        }
        self._stale = True
        period = self._interval if self._live is None else _REDRAW_SECONDS
        if step >= self._total or self._time() - self._shown_at >= period:
            self._show()

    def print(self, message: str) -> None:
        """Writes `message` as a line of its own, above the live one."""
        if self._live is None:
            self._write(message)
        else:
            self._live.console.print(message, markup=False, highlight=False, soft_wrap=True)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Keeps the time inside (evaluation, checkpoints) out of the time left."""
        start = self._time()
        try:
            yield
        finally:
            self._pace.skip(self._time() - start)

    def _show(self) -> None:
        self._shown_at = self._time()
        self._stale = False
        if self._live is None:
            self._write("  ".join(part for part in self._parts.values() if part))
        else:
            self._live.refresh()

    def _write(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()

    def _render(self) -> Text:
        if self._live is None or not self._parts:
            return Text("")
        console = self._live.console
        ascii_only = not console.encoding.lower().startswith("utf")
        return _live_line(self._parts, self._fraction, console.width, ascii_only)


class _Pace:
    """Seconds a step, over recent updates; the first update only starts the clock."""

    def __init__(self, time_fn: Callable[[], float]):
        self._time = time_fn
        self._skipped = 0.0
        self._samples: collections.deque[tuple[int, float]] = collections.deque(
            maxlen=_RECENT_UPDATES
        )

    def add(self, step: int) -> None:
        self._samples.append((step, self._time() - self._skipped))

    def skip(self, seconds: float) -> None:
        self._skipped += seconds

    def seconds_for(self, steps: int) -> float | None:
        """Estimates the seconds of `steps` more steps; None before two updates made progress."""
        (first_step, first_time), (last_step, last_time) = self._samples[0], self._samples[-1]
        if last_step <= first_step:
            return None
        return max(steps, 0) * (last_time - first_time) / (last_step - first_step)


def format_duration(seconds: float) -> str:
    """Writes seconds as `45s`, `3m10s`, `1h02m` or `2d03h`."""
    seconds = max(round(seconds), 0)
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    minutes = round(seconds / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60}h{minutes % 60:02d}m"
    hours = round(seconds / 3600)
    return f"{hours // 24}d{hours % 24:02d}h"


def _live_line(parts: dict[str, str], fraction: float, width: int, ascii_only: bool) -> Text:
    """Composes the live line in at most width - 1 columns, with a bar where it fits."""
    room = width - 1  # a full last column makes some terminals wrap
    shown = {name: part for name, part in parts.items() if part}
    for dropped in ("speed", "description", "percent", "left"):
        if _joined_width(shown) <= room:
            break
        shown.pop(dropped, None)
    bar_width = min(room - _joined_width(shown) - 2, _BAR_WIDTHS[1])
    line = Text(no_wrap=True, overflow="crop")
    for name, part in shown.items():
        if line.plain:
            line.append("  ")
        line.append(part, style=_STYLES.get(name, ""))
        if name == "percent" and bar_width >= _BAR_WIDTHS[0]:
            done = round(bar_width * fraction)
            full, empty = ("#", "-") if ascii_only else ("━", "─")
            line.append("  ").append(full * done, style="cyan")
            line.append(empty * (bar_width - done), style="bright_black")
    line.truncate(max(room, 1))
    return line


_STYLES = {"description": "bold", "percent": "cyan", "loss": "bold", "left": "cyan"}


def _joined_width(parts: dict[str, str]) -> int:
    return sum(Text(part).cell_len for part in parts.values()) + 2 * max(len(parts) - 1, 0)


def _format_speed(examples_per_second: float) -> str:
    if not math.isfinite(examples_per_second):
        return ""
    digits = 0 if examples_per_second >= 10 else 2
    return f"{examples_per_second:,.{digits}f} examples/s"

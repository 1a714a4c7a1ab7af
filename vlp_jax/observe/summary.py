"""The summary of a run at its end, as text and as WORKDIR/summary.json."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from vlp_jax.observe.accelerators import PeakFlops
from vlp_jax.observe.compilation import Compiled, describe
from vlp_jax.observe.goodput import RunTime, in_order
from vlp_jax.observe.progress import format_duration

SUMMARY_FILE = "summary.json"
_GIB = 2**30
_LABEL_WIDTH = 14


@dataclasses.dataclass(frozen=True)
class RunSummary:
    """The work of one process, and the run as a whole.

    Attributes:
      outcome: how it ended: "complete", or why not, in one line.
      first_step, last_step: this process did the steps from the first to before the last.
      examples: over all devices, of the steps of this process.
      speed: from `StepClock.overall`.
      peak: FLOP/s of one device.
      step_compiled, step_seconds: compilation of the step, and its time in all.
      compiled: all compilations of this process.
      cache: folder of the persistent compilation cache.
      memory: from `memory_metrics`, the largest of all processes.
      seconds: time of this process by cause.
      run: time of all processes up to now.
      notes, files: label -> a further row, and path of a file or folder.
    """

    outcome: str
    first_step: int
    last_step: int
    total_steps: int
    examples: int
    speed: Mapping[str, float]
    peak: PeakFlops
    step_compiled: Compiled
    step_seconds: float
    compiled: Compiled
    cache: str | None
    memory: Mapping[str, float]
    seconds: Mapping[str, float]
    run: RunTime
    notes: Mapping[str, str | float]
    files: Mapping[str, str]

    def to_json(self) -> str:
        """Writes everything but the marks of the ledger as one JSON object; times in seconds."""
        record: dict[str, Any] = dataclasses.asdict(self)
        del record["run"]["marks"]
        record["run"]["seconds"] = in_order(self.run.seconds)
        record["seconds"] = in_order(self.seconds)
        record["step_from_cache"] = self.step_compiled.from_cache()
        return json.dumps(record, indent=2) + "\n"

    def text(self) -> str:
        """Writes a block of lines to read."""
        rows = [
            ("steps", self._steps()),
            ("speed", self._speed()),
            ("compiled", self._compiled()),
            ("memory", self._memory()),
            ("compile cache", self.cache),
            *((label, str(value)) for label, value in self.notes.items()),
        ]
        lines = [f"summary: {self.outcome}"]
        lines += [f"  {label:<{_LABEL_WIDTH}}{value}" for label, value in rows if value]
        lines += self._time()
        lines += [f"  {label:<{_LABEL_WIDTH}}{path}" for label, path in self.files.items()]
        return "\n".join(lines)

    def _steps(self) -> str:
        done = self.last_step - self.first_step
        text = f"{self.last_step:,} of {self.total_steps:,}"
        text += f"; this start did {done:,} with {self.examples:,} examples"
        if self.run.steps_lost:
            text += f"; {self.run.steps_lost:,} of earlier starts were lost and done again"
        return text

    def _speed(self) -> str:
        if not self.speed:
            return ""
        peak = f"{self.peak.flops / 1e12:,.4g} TFLOP/s a device ({self.peak.source})"
        mfu = self.speed.get("perf/mfu")
        return (
            f"{self.speed['perf/examples_per_second']:,.1f} examples/s, "
            f"{self.speed['perf/steps_per_second']:,.3g} steps/s, "
            + (f"MFU not known: above {peak}" if mfu is None else f"MFU {mfu:.1%} of {peak}")
        )

    def _compiled(self) -> str:
        text = describe(self.step_compiled, self.step_seconds)
        if self.compiled.requests:
            text += f"; {self.compiled.hits} of {self.compiled.programs} programs came from it"
        return text

    def _memory(self) -> str:
        parts = []
        if "memory/peak_bytes_in_use" in self.memory:
            part = f"device {_gib(self.memory['memory/peak_bytes_in_use'])} at most"
            if "memory/limit" in self.memory:
                part += f" of {_gib(self.memory['memory/limit'])}"
            parts.append(part)
        if "memory/host_rss_bytes" in self.memory:
            parts.append(f"host {_gib(self.memory['memory/host_rss_bytes'])}")
        return ", ".join(parts)

    def _time(self) -> list[str]:
        """Writes a table of seconds by cause, of this process and of a run of several."""
        columns = [("this start", in_order(self.seconds))]
        if self.run.starts > 1:
            columns.append((f"all {self.run.starts} starts", in_order(self.run.seconds)))
        causes = [c for c, v in columns[-1][1].items() if v >= 0.005 or c == "useful"]
        width = max(len(cause) for cause in [*causes, "total"]) + 2
        head = "".join(f"{name:>18}" for name, _ in columns)
        lines = [f"  {'time':<{width + 2}}{head}"]
        for cause in [*causes, "total"]:
            line = f"    {cause:<{width}}"
            for _, seconds in columns:
                total = sum(seconds.values())
                value = total if cause == "total" else seconds.get(cause, 0.0)
                share = f"{value / total:.1%}" if total else ""
                line += f"{_duration(value):>10}{share:>8}"
            lines.append(line)
        return lines


def _gib(number: float) -> str:
    return f"{number / _GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds:.2f}s" if seconds < 60 else format_duration(seconds)

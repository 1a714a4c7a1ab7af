"""The contenders of a step benchmark, their times, and what these say as JSON and as a table."""

from __future__ import annotations

import dataclasses
import functools
import statistics
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from rich.console import Group

from tools.perf.harness import GIB, Ratio, in_turns, make_table, ratio
from tools.perf.jax_step import Peak

WARM_UP_STEPS = 3
HEADS = ("", "step ms", "examples/s", "TFLOP/s", "MFU", "memory GiB", "compile s")


class Contender(Protocol):
    """A training step with its state and a batch on the device.

    Attributes:
      name: shown in tables.
      notes: how the step differs from ours, a line each.
      facts: figures beside its times, for JSON: memory in bytes, seconds of the compilation,
        parameters.
    """

    name: str
    notes: tuple[str, ...]
    facts: dict[str, Any]

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps; returns the seconds of each. The device idles before and after."""


Turns = tuple[tuple[float, ...], ...]  # seconds of the steps of each round


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender and the seconds of its steps.

    Attributes:
      ratio: how many times as fast ours is, by the medians of each round; None for ours.
    """

    contender: Contender
    rounds: Turns
    ratio: Ratio | None

    @property
    def median(self) -> float:
        """The median of all steps."""
        return statistics.median(second for turn in self.rounds for second in turn)

    @property
    def round_medians(self) -> tuple[float, ...]:
        """The median of the steps of each round."""
        return tuple(map(statistics.median, self.rounds))

    @classmethod
    def all_of(cls, contenders: Sequence[Contender], rounds: Sequence[Turns]) -> list[Measured]:
        """Returns the contenders with their times; ours is the first."""
        found = [cls(one, own, None) for one, own in zip(contenders, rounds, strict=True)]
        ours = found[0].round_medians
        ratios = [ratio(one.round_medians, ours) for one in found[1:]]
        peers = (dataclasses.replace(m, ratio=r) for m, r in zip(found[1:], ratios, strict=True))
        return [found[0], *peers]


def measure(
    contenders: Sequence[Contender],
    rounds: int,
    steps: int,
    each_round: Callable[[list[Measured]], None] = lambda measured: None,
) -> list[Measured]:
    """Times the contenders in turns of `steps` steps; the first is ours.

    Args:
      each_round: is given the times so far after each round.
    """
    times: list[Turns] = [()] * len(contenders)
    turns = {str(n): functools.partial(one.run, steps) for n, one in enumerate(contenders)}
    for _ in range(rounds):
        # Always ours first: a peer's turn may leave memory or caches that the next one meets.
        found = in_turns(turns, 1, rotate=False)
        times = [(*own, tuple(found[str(n)][0])) for n, own in enumerate(times)]
        each_round(Measured.all_of(contenders, times))
    return Measured.all_of(contenders, times)


@dataclasses.dataclass(frozen=True)
class Result:
    """All figures of one run of the benchmark.

    Attributes:
      measured: ours first.
      batch_size: examples of a step.
      devices: number of devices that share our batch.
      step_flops: analytic FLOPs of the model in a step of ours. The peers are taken to need as
        many; their notes say what differs.
      failed: name of a peer -> why it could not be measured.
      complete: False while the measurement goes on.
    """

    measured: Sequence[Measured]
    batch_size: int
    devices: int
    step_flops: float
    peak: Peak
    failed: dict[str, str]
    complete: bool = True

    @property
    def beats_peak(self) -> bool:
        """True if a contender is faster than the product that was measured as the peak."""
        # No step is faster than a bare product: the peak was disturbed, and is measured again.
        return any(self.step_flops / m.median > self.peak.measured for m in self.measured)

    def figures(self, one: Measured) -> dict[str, float | None]:
        """Returns the rates of one contender, from the median of its steps.

        `mfu` is None where it would be above 1: the machine did other work when the peak or the
        steps were measured.
        """
        seconds = one.median
        rate = self.step_flops / seconds
        figures = {
            "step_seconds": seconds,
            "examples_per_second": self.batch_size / seconds,
            "model_flops_per_second": rate,
            "mfu": rate / self.peak.measured if rate <= self.peak.measured else None,
        }
        # Unknown for CPUs.
        if self.peak.data_sheet:
            figures["mfu_of_data_sheet"] = rate / self.peak.data_sheet
        return figures


def last_round(result: Result) -> str:
    """Returns a line about the newest round of each contender, for the log."""
    told = (f"{m.contender.name} {1e3 * m.round_medians[-1]:.1f} ms" for m in result.measured)
    return f"round {len(result.measured[0].rounds)}: {', '.join(told)}"


def as_json(result: Result) -> dict[str, Any]:
    """Returns everything, for `json.dumps`."""
    contenders = {
        one.contender.name: {
            **result.figures(one),
            "round_step_seconds": one.round_medians,
            "all_step_seconds": one.rounds,
            **one.contender.facts,
            "notes": one.contender.notes,
        }
        for one in result.measured
    }
    return {
        "batch_size": result.batch_size,
        "devices": result.devices,
        "examples_per_device": result.batch_size / result.devices,
        "step_flops": result.step_flops,
        "peak": dataclasses.asdict(result.peak),
        "contenders": contenders,
        "ours_over": {m.contender.name: m.ratio.as_json() for m in result.measured if m.ratio},
        "failed": result.failed,
        "complete": result.complete,
    }


def as_table(result: Result) -> Group:
    """Returns the table for a terminal, with the notes of each contender below it."""
    rows = []
    for one in result.measured:
        figures, facts = result.figures(one), one.contender.facts
        rows.append(
            (
                one.contender.name,
                f"{1e3 * figures['step_seconds']:.1f}",
                f"{figures['examples_per_second']:,.1f}",
                f"{figures['model_flops_per_second'] / 1e12:.3g}",
                "noisy" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
                _memory(facts),
                _compilation(facts),
                f"x {one.ratio:.2f}" if one.ratio else "",
            )
        )
    table = make_table(_title(result), (*HEADS, "ours is faster by (rounds)"), rows)
    lines = [table, *(f"{name}: FAILED: {why}" for name, why in result.failed.items())]
    for one in result.measured:
        lines += [f"{one.contender.name}: {note}" for note in one.contender.notes]
    return Group(*lines)


def _title(result: Result) -> str:
    peak = result.peak
    sheet = f", data sheet {peak.data_sheet / 1e12:.4g}" if peak.data_sheet else ""
    return (
        f"batch {result.batch_size}, {result.batch_size / result.devices:g} examples a device on "
        f"{result.devices}; {result.step_flops / 1e12:.4g} TFLOP a step; peak of {peak.dtype} "
        f"products measured here {peak.measured / 1e12:.4g} TFLOP/s{sheet}; MFU is of the measured"
    )


def _memory(facts: dict[str, Any]) -> str:
    """Returns the most that was in use where the device tells, else what the program asks for."""
    if "peak_bytes_in_use" in facts:
        return f"{facts['peak_bytes_in_use'] / GIB:.2f}"
    if facts.get("program_bytes"):
        return f"{sum(facts['program_bytes'].values()) / GIB:.2f} (program)"
    return "-"


def _compilation(facts: dict[str, Any]) -> str:
    if "first_step_seconds" in facts:
        return f"{facts['first_step_seconds']:.1f} (first step)"
    seconds = facts["compile_seconds"]
    if "warm" not in seconds:
        return f"{seconds['cold']:.1f}"
    kept = "" if seconds["from_cache"] else ", not from the cache"
    return f"{seconds['cold']:.1f}, warm {seconds['warm']:.1f}{kept}"

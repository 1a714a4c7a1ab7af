"""What a measurement found, as numbers for machines and as a table for people."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich.console import Group
from rich.table import Table

from vlp_jax.benchmarking.contender import Contender, Ratio, Times
from vlp_jax.benchmarking.peak import Peak

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Measured:
    """One contender and its times.

    Attributes:
      ratio: how many times as fast ours is; None for ours.
    """

    contender: Contender
    times: Times
    ratio: Ratio | None


@dataclasses.dataclass(frozen=True)
class Result:
    """All of one run.

    Attributes:
      measured: ours first.
      batch_size: examples of a step.
      devices: those that share our batch.
      step_flops: analytic FLOPs of the model in a step of ours. Those of others are taken to be as
        many; their notes say what differs.
      failed: name -> why a peer could not be measured.
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
        """Whether a contender is faster than the product that was measured as the peak."""
        return any(self.step_flops / m.times.median > self.peak.measured for m in self.measured)

    def figures(self, one: Measured) -> dict[str, float | None]:
        """Rates of one contender, from the median of its steps.

        `mfu` is None where it would be above 1: the machine did other work when the peak or the
        steps were measured.
        """
        seconds = one.times.median
        rate = self.step_flops / seconds
        figures = {
            "step_seconds": seconds,
            "examples_per_second": self.batch_size / seconds,
            "model_flops_per_second": rate,
            "mfu": rate / self.peak.measured if rate <= self.peak.measured else None,
        }
        if self.peak.data_sheet:
            figures["mfu_of_data_sheet"] = rate / self.peak.data_sheet
        return figures


def last_round(result: Result) -> str:
    """A line about the newest round of each, for the log."""
    told = (f"{m.contender.name} {1e3 * m.times.round_medians[-1]:.1f} ms" for m in result.measured)
    return f"round {len(result.measured[0].times.rounds)}: {', '.join(told)}"


def as_json(result: Result) -> dict[str, Any]:
    """Everything, for `json.dumps`."""
    contenders = {}
    for one in result.measured:
        contenders[one.contender.name] = {
            **result.figures(one),
            "round_step_seconds": one.times.round_medians,
            "all_step_seconds": one.times.rounds,
            **one.contender.facts,
            "notes": one.contender.notes,
        }
    ratios = {
        one.contender.name: {
            "median": one.ratio.median,
            "min": min(one.ratio.rounds),
            "max": max(one.ratio.rounds),
            "rounds": one.ratio.rounds,
        }
        for one in result.measured
        if one.ratio
    }
    return {
        "batch_size": result.batch_size,
        "devices": result.devices,
        "examples_per_device": result.batch_size / result.devices,
        "step_flops": result.step_flops,
        "peak": dataclasses.asdict(result.peak),
        "contenders": contenders,
        "ours_over": ratios,
        "failed": result.failed,
        "complete": result.complete,
    }


def as_table(result: Result) -> Group:
    """For a terminal."""
    table = Table(title=_title(result), title_justify="left")
    for name in ("", "step ms", "examples/s", "TFLOP/s", "MFU", "memory GiB", "compile s"):
        table.add_column(name, justify="right" if name else "left")
    table.add_column("ours is faster by (rounds)", justify="right")
    for one in result.measured:
        figures = result.figures(one)
        table.add_row(
            one.contender.name,
            f"{1e3 * figures['step_seconds']:.1f}",
            f"{figures['examples_per_second']:,.1f}",
            f"{figures['model_flops_per_second'] / 1e12:.3g}",
            "noisy" if figures["mfu"] is None else f"{figures['mfu']:.1%}",
            _memory(one.contender.facts),
            _compilation(one.contender.facts),
            _ratio(one.ratio),
        )
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
    """What was in use at most where the device tells, else what the program asks for."""
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


def _ratio(ratio: Ratio | None) -> str:
    if ratio is None:
        return ""
    return f"x {ratio.median:.2f} ({min(ratio.rounds):.2f} to {max(ratio.rounds):.2f})"

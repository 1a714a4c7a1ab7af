"""The section of time by cause, and of speed."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from vlp_jax.observe.goodput import USEFUL, in_order
from vlp_jax.report.blocks import Beside, Block, Chart, Charts, Section, Table
from vlp_jax.report.charts import bars
from vlp_jax.report.run_record import RunRecord
from vlp_jax.report.wording import percent, plain, seconds_text

_GIB = 2**30


def time_section(run: RunRecord) -> Section | None:
    """Shows time by cause and figures of speed; None if the run wrote neither."""
    blocks: list[Block] = []
    if run.run_time is not None and sum(run.run_time.seconds.values()) > 0:
        blocks.append(Charts([_causes(run.run_time.seconds)]))
    if rows := [[name, text] for name, text in speed(run).items()]:
        blocks.append(Table("Speed of the run", ["", "value"], rows))
    return Section("time", "Time and speed", [Beside(blocks)]) if blocks else None


def useful_share(run: RunRecord) -> float | None:
    """Returns the goodput: useful time over all time, in [0, 1]; None if it is not known."""
    if run.run_time is None:
        return None
    total = sum(run.run_time.seconds.values())
    return run.run_time.seconds.get(USEFUL, 0.0) / total if total else None


def speed(run: RunRecord) -> dict[str, str]:
    """Returns label -> text of figures of speed, memory and interruptions."""
    summary, told = run.summary, run.summary.get("speed", {})
    found: dict[str, str] = {}
    share = useful_share(run)
    if share is not None:
        found["goodput"] = percent(share)
    if run.run_time is not None:
        time_of_run = run.run_time
        found["whole time"] = seconds_text(sum(time_of_run.seconds.values()))
        began = datetime.datetime.fromtimestamp(time_of_run.began_at, datetime.UTC)
        found["began"] = began.strftime("%Y-%m-%d %H:%M UTC")
        found["ended"] = time_of_run.ended or "no sign of its end"
        found["processes started"] = f"{time_of_run.starts:,}"
        found["steps done again"] = f"{time_of_run.steps_lost:,}"
    rates = ("perf/examples_per_second", "perf/steps_per_second", "perf/mfu")
    for name in rates:
        value = told.get(name, _newest(run, name))
        if value is not None:
            title = name.partition("/")[2].replace("_per_", " per ").replace("mfu", "MFU")
            found[title] = percent(value) if name.endswith("mfu") else plain(value)
    peak = summary.get("peak", {})
    if peak.get("flops"):
        found["peak of a device"] = f"{peak['flops'] / 1e12:,.3g} TFLOP/s ({peak['source']})"
    for name, title in (
        ("memory/peak_bytes_in_use", "peak memory of a device"),
        ("memory/host_rss_bytes", "memory of the host"),
    ):
        value = _memory(summary, name)
        if value:
            found[title] = f"{value / _GIB:.2f} GiB"
    return found


def _causes(seconds: Mapping[str, float]) -> Chart:
    # A cause that took no time is no bar.
    shown = {cause: value for cause, value in in_order(seconds).items() if value > 0}
    total = sum(shown.values())
    texts = {c: f"{seconds_text(s)}, {percent(s / total)}" for c, s in shown.items()}
    label = "Time by cause: " + "; ".join(f"{cause} {text}" for cause, text in texts.items())
    caption = f"Shares of {seconds_text(total)} since the first process began."
    return Chart("Where the time went", bars(shown, texts, label), caption)


def _newest(run: RunRecord, name: str) -> float | None:
    values = run.curve(name)[1]
    return values[-1] if values else None


def _memory(summary: Mapping[str, Any], name: str) -> float | None:
    return summary.get("memory", {}).get(name)

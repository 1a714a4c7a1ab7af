"""Sections of a run: its curves, its time and speed, its config."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax import defaults
from vlp_jax.observe.goodput import USEFUL, in_order
from vlp_jax.report import wording
from vlp_jax.report.blocks import Beside, Block, Chart, Charts, Code, Fold, Section, Table, Text
from vlp_jax.report.charts import Series, bars, line_chart
from vlp_jax.report.run_record import RunRecord
from vlp_jax.report.scores import PREFIX, Score, better_direction, headlines, title_of
from vlp_jax.report.wording import percent, plain, seconds_text

SKIPPED = "train/skipped"
# The metrics that are shown first, in this order; the rest is folded away.
MAIN = ("train/loss", "train/learning_rate", "train/grad_norm")
_NEXT = ("perf/examples_per_second", "train/batch_accuracy", "train/logit_scale")
_ROW = 3  # drawings side by side on a wide screen: as many of `_NEXT` are shown as fill a row
_BY_LOGARITHM = ("train/grad_norm",)
_SHARES = ("train/batch_accuracy", "perf/mfu")
# They follow from examples a second, or are in the table of speed.
_FEW_CARE = ("perf/steps_per_second", "perf/step_seconds", "perf/device_wait_fraction")
_MOST_FOLDED = 24
_MOST_SKIPPED = 20
_MOST_EVALUATORS = 6  # that are overlaid in one drawing


def curves_section(run: RunRecord) -> Section | None:
    """Builds the curves of training and evaluation; None if the run wrote no metrics."""
    scores = score_charts([("", run)])
    main = [chart for name in MAIN if (chart := metric_chart(name, [("", run)]))]
    names = [*run.names("train/")[:_MOST_FOLDED], *run.names("perf/")]
    # As many as fill the last row of drawings.
    next_ones = [n for n in _NEXT if n in names][: -(len(main) + len(scores)) % _ROW]
    main += [chart for name in next_ones if (chart := metric_chart(name, [("", run)]))]
    rest = [n for n in names if n not in (*MAIN, *next_ones, SKIPPED) and n not in _FEW_CARE]
    more = [chart for name in rest if (chart := metric_chart(name, [("", run)]))]
    if not main and not scores:
        return None
    blocks: list[Block] = [Charts([*main[:1], *scores, *main[1:]]), *_skipped(run)]
    if more:
        blocks.append(Fold(f"{len(more)} more curves", [Charts(more)]))
    return Section("curves", "Training", blocks)


def metric_chart(name: str, runs: Sequence[tuple[str, RunRecord]]) -> Chart | None:
    """Draws a metric of (name, run) pairs over the steps; None if no run has it."""
    title = name.partition("/")[2].replace("_", " ")
    title = title.replace("grad norm", "gradient norm").replace("param norm", "parameter norm")
    share = name in _SHARES
    curves = [Series(label, *run.curve(name)) for label, run in runs]
    svg = line_chart(
        [c for c in curves if len(c.steps)], title, share=share, log=name in _BY_LOGARITHM
    )
    if svg is None:
        return None
    # NaN is the one value that differs from itself.
    odd = sum(
        1 for c in curves for value in c.values if value != value or abs(value) == float("inf")
    )
    caption = f"{odd:,} logged values are not finite and not drawn." if odd else ""
    return Chart(title, svg, caption)


def score_charts(runs: Sequence[tuple[str, RunRecord]]) -> list[Chart]:
    """Draws main scores over the steps: of one run in one drawing, of several one for each."""
    all_scores: dict[str, float] = {}
    for _, run in runs:
        all_scores |= run.last_scores()[0]
    main = headlines(all_scores, None)
    if len(runs) > 1:
        return [
            chart
            for score in main
            if (chart := _score_chart(f"{score.evaluator}: {title_of(score.name)}", [score], runs))
        ]
    shares = [s for s in main if wording.is_share(s.name) and better_direction(s.name) > 0]
    others = [s for s in main if s not in shares]
    charts = [_score_chart("scores", shares[:_MOST_EVALUATORS], runs)] if shares else []
    charts += [_score_chart(f"{s.evaluator}: {title_of(s.name)}", [s], runs) for s in others]
    return [chart for chart in charts if chart]


def _score_chart(
    title: str, scores: Sequence[Score], runs: Sequence[tuple[str, RunRecord]]
) -> Chart | None:
    several = len(runs) > 1
    evaluators = [score.evaluator for score in scores]
    curves = []
    for label, run in runs:
        for score in scores:
            steps, values = run.curve(f"{PREFIX}{score.evaluator}/{score.name}")
            alone = evaluators.count(score.evaluator) == 1
            name = score.evaluator if alone else title_of(score.name)
            # One line of chance is enough: it is the same for all runs.
            level = score.chance if not several or label == runs[0][0] else None
            if steps:
                curves.append(Series(label if several else name, steps, values, level))
    share = all(wording.is_share(score.name) for score in scores)
    svg = line_chart(curves, title, share=share)
    if svg is None:
        return None
    caption = "Dotted: chance." if any(c.level is not None for c in curves) else ""
    names = {title_of(score.name) for score in scores if evaluators.count(score.evaluator) == 1}
    if not several and len(names) == 1 and len(scores) > 1:
        alone = [score.evaluator for score in scores if evaluators.count(score.evaluator) == 1]
        caption = f"Of {' and '.join(alone)}: {names.pop()}. {caption}".strip()
    return Chart(title, svg, caption)


def _skipped(run: RunRecord) -> list[Block]:
    """Tells of the steps that the guard skipped."""
    steps, values = run.curve(SKIPPED)
    if not steps:
        return []
    at = [step for step, value in zip(steps, values) if value]
    told = run.summary.get("notes", {}).get("steps skipped", 0)
    if not at and not told:
        return [Text("No logged step was skipped by the guard against losses that are not finite.")]
    losses = dict(zip(*run.curve("train/loss")))
    rows = [[f"{step:,}", plain(losses.get(step, float("nan")))] for step in at]
    text = f"{max(int(told), len(at)):,} steps were skipped; {len(at):,} of them were logged."
    table = Table("Skipped steps that were logged", ["step", "loss"], rows[:_MOST_SKIPPED], (0, 1))
    return [Text(text), *([table] if at else [])]


_GIB = 2**30


def time_section(run: RunRecord) -> Section | None:
    """Shows time by cause and figures of speed; None if the run wrote neither."""
    blocks: list[Block] = []
    if run.run_time is not None and sum(run.run_time.seconds.values()) > 0:
        blocks.append(Charts([_causes(run.run_time.seconds)]))
    if rows := [[name, text] for name, text in speed(run).items()]:
        blocks.append(Table("Speed of the run", ["", "value"], rows))
    return Section("time", "Time and speed", [Beside(blocks)]) if blocks else None


def speed(run: RunRecord) -> dict[str, str]:
    """Returns label -> text of figures of speed, memory and interruptions."""
    summary, told = run.summary, run.summary.get("speed", {})
    found: dict[str, str] = {}
    if run.run_time is not None:
        time_of_run = run.run_time
        total = sum(time_of_run.seconds.values())
        if total:
            found["goodput"] = percent(time_of_run.seconds.get(USEFUL, 0.0) / total)
        found["whole time"] = seconds_text(total)
        began = datetime.datetime.fromtimestamp(time_of_run.began_at, datetime.UTC)
        found["began"] = began.strftime("%Y-%m-%d %H:%M UTC")
        found["ended"] = time_of_run.ended or "no sign of its end"
        found["processes started"] = f"{time_of_run.starts:,}"
        found["steps done again"] = f"{time_of_run.steps_lost:,}"
    rates = ("perf/examples_per_second", "perf/steps_per_second", "perf/mfu")
    for name in rates:
        value = told.get(name, next(reversed(run.curve(name)[1]), None))
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
        if value := summary.get("memory", {}).get(name):
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


_LONGEST_VALUE = 90  # letters
_LONGEST_TEXT = 150_000  # letters; a config may hold thousands of class names
ABSENT = "\N{EN DASH}"


def config_section(config: ConfigDict, other: ConfigDict | None, title: str) -> Section:
    """Builds a table of differences from `other` or the defaults; the whole config is folded."""
    own = flat(config)
    blocks: list[Block] = []
    if other is not None:
        blocks.append(difference_table({title: flat(other), "this run": own}))
    else:
        base = flat(defaults.base())
        # Arguments of parts have no common default: they are listed by themselves.
        changed = {key: value for key, value in own.items() if key in base}
        blocks.append(difference_table({"default": base, "this run": changed}))
        parts = {k: v for k, v in own.items() if k not in base}
        rows = [[key, written(value)] for key, value in parts.items()]
        table = Table("Keys of the parts that the config chooses", ["key", "value"], rows)
        blocks.append(Fold(f"{len(rows)} keys that have no common default", [table]))
    text = config_lib.to_json(config)
    if len(text) > _LONGEST_TEXT:
        text = text[:_LONGEST_TEXT] + "\n(cut here)\n"
    blocks.append(Fold("The whole config", [Code("config.json", text)]))
    return Section("config", "Config", blocks)


def differences(configs: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Returns the keys whose values are not the same in all flat configs, in order."""
    first, *others = configs.values()
    keys = sorted({key for config in configs.values() for key in config})
    missing = object()  # None is a value of many keys
    return [k for k in keys if any(o.get(k, missing) != first.get(k, missing) for o in others)]


def flat(config: ConfigDict) -> dict[str, Any]:
    """Returns dotted key -> value."""
    # Through JSON, as the configs of runs came: else a tuple would differ from a list.
    return dict(config_lib.flatten(config_lib.from_json(config_lib.to_json(config))))


def written(value: Any) -> str:
    """Writes a value; a long one is cut in the middle."""
    text = repr(value) if not isinstance(value, str) else value
    if len(text) <= _LONGEST_VALUE:
        return text or "''"
    many = (
        f" {len(value):,} in all"
        if isinstance(value, Sequence) and not isinstance(value, str)
        else ""
    )
    return f"{text[: _LONGEST_VALUE - 20]} …{many}"


def difference_table(configs: Mapping[str, Mapping[str, Any]]) -> Table | Text:
    """Builds a table of the keys that differ, with the value in each flat config."""
    keys = differences(configs)
    if not keys:
        return Text(f"No key differs: {' and '.join(configs)} are the same.")
    rows = [
        [key, *(written(c[key]) if key in c else ABSENT for c in configs.values())] for key in keys
    ]
    caption = f"{len(keys)} keys that differ" if len(keys) > 1 else "1 key that differs"
    return Table(caption, ["key", *configs], rows)

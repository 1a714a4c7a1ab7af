"""The section of curves: loss, scores and speed over the steps."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_jax.report import wording
from vlp_jax.report.blocks import Block, Chart, Charts, Fold, Section, Table, Text
from vlp_jax.report.charts import Series, line_chart
from vlp_jax.report.run_record import RunRecord
from vlp_jax.report.scores import PREFIX, Score, better_direction, headlines, title_of

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
    """Draws a metric of some runs over the steps; None if no run has it.

    Args:
      runs: (name of the curve, run) pairs.
    """
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
    """Draws the main scores over the steps.

    The scores of one run share a drawing; of several runs, each score has a drawing.
    """
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
    rows = [[f"{step:,}", wording.plain(_value(run, step, "train/loss"))] for step in at]
    text = f"{max(int(told), len(at)):,} steps were skipped; {len(at):,} of them were logged."
    table = Table("Skipped steps that were logged", ["step", "loss"], rows[:_MOST_SKIPPED], (0, 1))
    return [Text(text), *([table] if at else [])]


def _value(run: RunRecord, step: int, name: str) -> float:
    """Returns a metric at a step; NaN if it was not written."""
    return dict(zip(*run.curve(name))).get(step, float("nan"))

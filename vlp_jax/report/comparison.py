"""The page of several runs side by side, from their files; nothing is computed again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

from vlp_jax.errors import UserError
from vlp_jax.report import page
from vlp_jax.report.blocks import GOOD, PLAIN, Block, Cell, Charts, Section, Table, Text
from vlp_jax.report.page import provenance
from vlp_jax.report.run_record import RunRecord, short_names
from vlp_jax.report.scores import (
    about,
    better_direction,
    by_evaluator,
    headlines,
    scores_of,
    title_of,
)
from vlp_jax.report.section_run import (
    ABSENT,
    difference_table,
    flat,
    metric_chart,
    score_charts,
    speed,
)
from vlp_jax.report.wording import score_text

MOST_RUNS = 6  # as many curves can be told apart
_CURVES = ("train/loss", "train/grad_norm", "train/learning_rate", "perf/examples_per_second")
BEST = "\N{BLACK STAR}"


def write_comparison(
    path: str | os.PathLike[str], workdirs: Sequence[str], command: Sequence[str] = ()
) -> list[str]:
    """Writes the page of 2 to 6 runs and returns lines for the user.

    Raises:
      UserError: a folder holds no run or is named twice, there are too many, or the page cannot be
        written.
    """
    file = page.check_output(path)
    if not 2 <= len(workdirs) <= MOST_RUNS:
        raise UserError(f"2 to {MOST_RUNS} runs can be compared, not {len(workdirs)}")
    # By real paths: a link to a run is the same run.
    if len({os.path.realpath(workdir) for workdir in workdirs}) < len(workdirs):
        raise UserError("--compare: a run is named twice")
    names = short_names(workdirs)
    runs = {name: RunRecord.read(workdir) for name, workdir in zip(names, workdirs)}
    sections = [_scores(runs), _curves(runs), _configs(runs), _times(runs)]
    facts = [
        f"{name}: step {run.last_step:,}, {run.config.objective.get('name', '')}"
        for name, run in runs.items()
    ]
    title = f"Comparison of {len(runs)} runs"
    html = page.render(title, facts, [s for s in sections if s is not None], provenance(command))
    page.write(file, html)
    return [f"wrote {path}"]


def best_of(name: str, values: Mapping[str, float]) -> list[str]:
    """Returns the runs with the best value; none if all are equal or the score has no direction."""
    direction = better_direction(name)
    if not direction or len(set(values.values())) < 2:
        return []
    best = max(direction * value for value in values.values())
    return [run for run, value in values.items() if direction * value == best]


def _scores(runs: Mapping[str, RunRecord]) -> Section:
    last = {name: run.last_scores() for name, run in runs.items()}
    every: dict[str, float] = {}  # the union, in the order of the first run
    for scores, _ in last.values():
        every = {**scores, **every}
    if not every:
        text = "None of these runs has scores yet: evaluate them with --all."
        return Section("scores", "Scores", [Text(text)])
    blocks: list[Block] = [_headline_table(every, last)]
    rows: list[list[str | Cell]] = []
    named = by_evaluator(every)
    for score in scores_of(every):
        over = f"{score.evaluator} ({about(named[score.evaluator])})"
        if [over] not in rows:
            rows.append([over])
        rows.append(_row(score.evaluator, score.name, title_of(score.name), last))
    steps = ", ".join(f"{name} {_span(at)}" for name, (_, at) in last.items() if at)
    caption = f"All scores, the newest of each; steps: {steps}. {BEST} marks the best."
    numeric = tuple(range(1, len(runs) + 1))
    blocks.append(Table(caption, ["score", *runs], rows, numeric))
    return Section("scores", "Scores", blocks)


def _span(steps: Sequence[int]) -> str:
    return f"{steps[0]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"


def _headline_table(every: Mapping[str, float], last: Mapping[str, tuple]) -> Table:
    rows = [
        _row(s.evaluator, s.name, f"{s.evaluator}: {title_of(s.name)}", last)
        for s in headlines(every, None)
    ]
    caption = f"Main scores. {BEST} marks the best."
    return Table(caption, ["score", *last], rows, tuple(range(1, len(last) + 1)))


def _row(evaluator: str, name: str, title: str, last: Mapping[str, tuple]) -> list[str | Cell]:
    key = f"eval/{evaluator}/{name}"
    values = {run: scores[key] for run, (scores, _) in last.items() if key in scores}
    best = best_of(name, values)
    row: list[str | Cell] = [title]
    for run in last:
        if run not in values:
            row.append(ABSENT)
            continue
        text = score_text(name, values[run])
        row.append(Cell(f"{BEST} {text}", GOOD) if run in best else Cell(text, PLAIN))
    return row


def _curves(runs: Mapping[str, RunRecord]) -> Section | None:
    labelled = list(runs.items())
    charts = score_charts(labelled)
    charts += [c for name in _CURVES if (c := metric_chart(name, labelled))]
    return Section("curves", "Curves", [Charts(charts)]) if charts else None


def _configs(runs: Mapping[str, RunRecord]) -> Section:
    table = difference_table({name: flat(run.config) for name, run in runs.items()})
    return Section("config", "Config", [table])


def _times(runs: Mapping[str, RunRecord]) -> Section | None:
    figures = {name: speed(run) for name, run in runs.items()}
    rows = list(dict.fromkeys(row for found in figures.values() for row in found))
    if not rows:
        return None
    cells = [[row, *(found.get(row, ABSENT) for found in figures.values())] for row in rows]
    numeric = tuple(range(1, len(runs) + 1))
    return Section(
        "time", "Time and speed", [Table("Speed of each run", ["", *runs], cells, numeric)]
    )

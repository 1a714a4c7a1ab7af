"""The first sections: main scores in large type, and all scores as a table."""

from __future__ import annotations

from collections.abc import Mapping

from vlp_jax.report.baseline import Baseline
from vlp_jax.report.blocks import BAD, GOOD, PLAIN, Block, Cell, Section, Table, Text, Tile, Tiles
from vlp_jax.report.scores import (
    BETTER,
    WORSE,
    Score,
    about,
    by_evaluator,
    headlines,
    scores_of,
    title_of,
)
from vlp_jax.report.wording import is_share, score_text

_TONES = {BETTER: GOOD, WORSE: BAD}
MOST_TILES = 8


def headline_section(scores: Mapping[str, float], baseline: Baseline | None) -> Section:
    """Shows the main scores of each evaluator, with chance and the change from the baseline."""
    tiles = [_tile(score) for score in headlines(scores, baseline and baseline.scores)]
    return Section("summary", "Summary", [Tiles(tiles[:MOST_TILES])])


def _tile(score: Score) -> Tile:
    notes = [score.evaluator]
    if score.chance is not None:
        notes.append(f"chance {score_text(score.name, score.chance)}")
    change = None
    if score.baseline is not None:
        notes.append(f"baseline {score_text(score.name, score.baseline)}")
        change = (score.change, _TONES.get(score.verdict or "", PLAIN))
    return Tile(title_of(score.name), score.text, notes, change)


def table_section(
    scores: Mapping[str, float], baseline: Baseline | None, notices: list[str]
) -> Section:
    """Builds the table of every score of every evaluator."""
    head = ["score", "value", "chance"] + (["baseline", "difference"] if baseline else [])
    named = by_evaluator(scores)
    rows: list[list[str | Cell]] = []
    for score in scores_of(scores, baseline and baseline.scores):
        title = f"{score.evaluator} ({about(named[score.evaluator])})"
        if [title] not in rows:
            rows.append([title])
        share = score.value if is_share(score.name) and 0 <= score.value <= 1 else None
        chance = "" if score.chance is None else score_text(score.name, score.chance)
        cell = Cell(score.text, share=share, mark=score.chance)
        row: list[str | Cell] = [title_of(score.name), cell, chance]
        if baseline:
            old = "" if score.baseline is None else score_text(score.name, score.baseline)
            row += [old, Cell(score.change, _TONES.get(score.verdict or "", PLAIN))]
        rows.append(row)
    beside = f", beside the scores of {baseline.title}" if baseline else ""
    caption = f"Scores of each evaluator{beside}. The mark on a bar is chance."
    numeric = range(1, len(head))
    blocks: list[Block] = [Table(caption, head, rows, tuple(numeric))]
    blocks += [Text(notice) for notice in notices]
    return Section("scores", "All scores", blocks)

"""The report of one model, its scores and its training, as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlp_jax.encoders.subject import Subject
from vlp_jax.evaluators.base import Outcome
from vlp_jax.evaluators.captioning import CaptionsOutcome
from vlp_jax.evaluators.reconstruction import ReconstructionOutcome
from vlp_jax.evaluators.retrieval import RetrievalOutcome
from vlp_jax.evaluators.zero_shot import ZeroShotOutcome
from vlp_jax.report import page
from vlp_jax.report.blocks import BAD, GOOD, PLAIN, Block, Cell, Section, Table, Text, Tile, Tiles
from vlp_jax.report.material import Material
from vlp_jax.report.page import provenance
from vlp_jax.report.pictures import (
    Album,
    heat_section,
    paintings_section,
    samples_section,
)
from vlp_jax.report.run_record import Baseline, RunRecord
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
from vlp_jax.report.section_data import data_section
from vlp_jax.report.section_retrieval import retrieval_section
from vlp_jax.report.section_run import config_section, curves_section, time_section
from vlp_jax.report.section_zero_shot import zero_shot_section
from vlp_jax.report.wording import is_share, plain, score_text
from vlp_jax.training.restore import LoadedParameters

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


def write_report(
    path: str | os.PathLike[str],
    subject: Subject,
    loaded: LoadedParameters,
    material: Material,
    *,
    baseline: Baseline | None = None,
    command: Sequence[str] = (),
) -> list[str]:
    """Writes the page of evaluated parameters, and returns lines for the user.

    Raises:
      UserError: the page cannot be written, or a file of the run is damaged.
    """
    file = page.check_output(path)
    run = None if subject.workdir is None else RunRecord.read(subject.workdir)
    notices = [] if baseline is None else baseline.unknown(material.findings.scores)
    # "demo/run" says enough; the whole path would wrap on a phone.
    title = "/".join(str(subject.title).rstrip("/").split("/")[-2:])
    facts = _facts(subject, loaded, material, run, baseline)

    # Called again with a smaller album while the page is too large.
    def build(album: Album) -> str:
        sections = _sections(subject, material, run, baseline, notices, album)
        return page.render(title, facts, sections, provenance(command))

    page.write(file, page.render_small(build))
    return [f"wrote {path}", *(f"note: {notice}" for notice in notices)]


# The section for the outcome of an evaluator, by its type, in the order of the page.
SECTIONS: dict[type[Outcome], Callable[[str, Any, Material, Album], Section | None]] = {
    ZeroShotOutcome: lambda name, outcome, material, album: zero_shot_section(
        name, outcome, material.mistakes[name], album
    ),
    RetrievalOutcome: lambda name, outcome, material, album: retrieval_section(
        name, outcome, material.texts[name], material.pairs[name], album
    ),
    CaptionsOutcome: lambda name, outcome, material, album: samples_section(name, outcome, album),
    ReconstructionOutcome: lambda name, outcome, material, album: paintings_section(
        material.views, material.hidden, album
    ),
}


def _sections(
    subject: Subject,
    material: Material,
    run: RunRecord | None,
    baseline: Baseline | None,
    notices: list[str],
    album: Album,
) -> list[Section]:
    scores = material.findings.scores
    found: list[Section | None] = [
        headline_section(scores, baseline),
        table_section(scores, baseline, notices),
        None if run is None else curves_section(run),
    ]
    for kind, section in SECTIONS.items():
        for name, outcome in material.outcomes(kind).items():
            found.append(section(name, outcome, material, album))
    found.append(heat_section(material.heat, album))
    if run is not None:
        context = getattr(subject.resources.tokenizer, "context_length", None)
        found.append(data_section(material.data, context))
        found.append(time_section(run))
        other = None if baseline is None or baseline.run is None else baseline.run.config
        found.append(config_section(run.config, other, "baseline"))
    if album.left_out:
        text = f"{album.left_out} pictures are left out, so that the page stays small."
        found.append(Section("left-out", "Left out", [Text(text)]))
    return [section for section in found if section is not None]


def _facts(
    subject: Subject,
    loaded: LoadedParameters,
    material: Material,
    run: RunRecord | None,
    baseline: Baseline | None,
) -> list[str]:
    """Returns the lines under the title."""
    size = f"{plain(material.parameters)} parameters"
    if material.parameters >= 1e6:
        size = f"{material.parameters / 1e6:,.1f} million parameters"
    if run is None:
        facts = [f"Weights of {subject.title}, {size}, scored by the evaluators of a config."]
    else:
        config = run.config
        kind = config.objective.get("name", "")
        loss = f" ({config.objective.loss})" if "loss" in config.objective else ""
        part = ", averaged" if loaded.part == "ema" else ""
        examples = plain(loaded.step * config.batch_size)
        facts = [
            f"{kind}{loss}, {size}; step {loaded.step:,}{part}: {examples} examples "
            f"in batches of {config.batch_size:,}."
        ]
        facts[0] = facts[0][:1].upper() + facts[0][1:]
    if baseline is not None:
        facts.append(f"Compared with {baseline.title}.")
    return [*facts, *subject.notes]

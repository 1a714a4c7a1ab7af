"""The section of the training data: its amount, lengths of texts and sizes of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from vlp_jax.data.pipeline import split_mixture
from vlp_jax.data.scan import Scan, Tokenizers, scan
from vlp_jax.data.sources.base import as_plain
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.report.blocks import Beside, Block, Chart, Charts, Section, Table, Text
from vlp_jax.report.charts import histogram
from vlp_jax.report.wording import percent
from vlp_jax.training.workdir import TOKENIZER

LOOKED_AT = 2_000  # examples of each part; their shares are known to about 1 %
_SEED = 0


def scan_training_data(subject: Subject) -> dict[str, Scan] | str:
    """Scans a sample of each part of the training data; returns the reason if it cannot."""
    config, workdir = subject.config, subject.workdir
    section = {key: value for key, value in config.tokenizer.items() if key != "file"}
    kept = None if workdir is None else workdir / TOKENIZER
    try:
        tokenizers = Tokenizers(section if kept else {}, lambda: iter(()), kept)
        # A report should show bad examples, not fail because there are too many.
        parts, _ = split_mixture({**as_plain(config.data), "max_bad_fraction": 1.0})
        return {
            name: scan(
                part,
                tokenizers,
                count=LOOKED_AT,
                seed=_SEED,
                begin=lambda total: None,
                advance=lambda done: None,
            )
            for name, part in parts.items()
        }
    except (UserError, OSError) as error:
        return str(error)


def data_section(found: Mapping[str, Scan] | str, context_length: int | None) -> Section:
    """Builds a table of figures of each part, and histograms with the model's context length."""
    if isinstance(found, str):
        text = f"The training data could not be looked at on this machine: {found}"
        return Section("data", "Training data", [Text(text)])
    charts = []
    for name, part in found.items():
        label = "" if len(found) == 1 else f"{name}: "
        charts += _charts(part, context_length, label)
    blocks: list[Block] = [_table(found), *([Charts(charts)] if charts else [])]
    # Two charts and the table fill a row of a wide screen.
    beside = len(found) == 1 and len(charts) < 3
    return Section("data", "Training data", [Beside(blocks)] if beside else blocks)


def _table(found: Mapping[str, Scan]) -> Table:
    rows: list[list[str]] = []

    def row(name: str, tell: Any) -> None:
        cells = [tell(part) for part in found.values()]
        if any(cells):
            rows.append([name, *cells])

    row("examples", lambda p: f"{p.examples:,}")
    row("of these looked at", lambda p: f"{p.read:,}")
    row("of these not usable", lambda p: f"{p.bad.total():,}" + _reasons(p))
    row("tokens of a text", lambda p: _spread(p.tokens))
    row("letters of a text", lambda p: _spread(p.characters))
    row("width, pixels", lambda p: _spread([size[0] for size in p.sizes]))
    row("height, pixels", lambda p: _spread([size[1] for size in p.sizes]))
    row("bytes of an image", lambda p: _spread(p.encoded_bytes))
    row("formats", lambda p: ", ".join(f"{kind} {n:,}" for kind, n in p.formats.most_common()))
    row("images that occur twice", _twice)
    caption = "Numbers of an example: median (5 % to 95 % of all)"
    head = ["", *("training data" if len(found) == 1 else name for name in found)]
    return Table(caption, head, rows, tuple(range(1, len(head))))


def _reasons(part: Scan) -> str:
    told = ", ".join(f"{reason} {n:,}" for reason, n in part.bad.most_common())
    return f" ({told})" if told else ""


def _twice(part: Scan) -> str:
    total = part.digests.total()
    return percent(1 - len(part.digests) / total) if total else ""


def _spread(values: list[int]) -> str:
    if not values:
        return ""
    # Not the extremes: one odd file would hide how the rest is spread.
    low, middle, high = np.percentile(values, (5, 50, 95))
    return f"{middle:,.0f}" + (f" ({low:,.0f} to {high:,.0f})" if low < high else "")


def _charts(part: Scan, context_length: int | None, label: str) -> list[Chart]:
    charts = []
    if part.tokens:
        mark = caption = None
        if context_length is not None:
            cut = float((np.asarray(part.tokens) > context_length).mean())
            mark = (context_length, f"context {context_length}")
            caption = f"{percent(cut)} are longer than the context and are cut."
            caption = caption if cut else "None is longer than the context."
        title = f"{label}tokens of a text"
        svg = histogram(part.tokens, f"Histogram of {title}", "tokens", mark)
        charts.append(Chart(title, svg, caption or ""))
    longer = [max(size) for size in part.sizes]
    if len(set(longer)) > 1:
        title = f"{label}longer side of an image"
        charts.append(Chart(title, histogram(longer, f"Histogram of {title}", "pixels")))
    return charts

"""Bars, histograms, reliability diagrams and confusion matrices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup

from vlp_jax.report import wording
from vlp_jax.report.axes import Scale, nice_ticks
from vlp_jax.report.svg import FONT, Drawing, text_width

WIDTH = 380.0
_ROW = 24.0
_CELL = 13.0  # of a confusion matrix


def meter(share: float, mark: float | None = None, tone: str = "accent") -> Markup:
    """A small bar that is full by `share` in [0, 1], with a mark at `mark`, as chance has it.

    It stands beside the number, so those who do not see it miss nothing.
    """
    drawing = Drawing(60, 10, wording.percent(share), natural=True)
    drawing.add("rect", x=0, y=1, width=60, height=8, rx=2, cls="f-line")
    drawing.add("rect", x=0, y=1, width=60 * min(max(share, 0), 1), height=8, rx=2, cls=f"f-{tone}")
    if mark is not None:
        drawing.line(60 * mark, 0, 60 * mark, 10, "s-ink")
    return drawing.markup()


def bars(values: Mapping[str, float], texts: Mapping[str, str], label: str) -> Markup:
    """Horizontal bars with their names before and their values after them.

    Args:
      values: name -> a number that is not negative, in the order of the bars.
      texts: name -> how the value is written.
    """
    left = max(text_width(name) for name in values) + 10
    room = WIDTH - left - max(text_width(text) for text in texts.values()) - 12
    top = max(*values.values(), 1e-12)
    drawing = Drawing(WIDTH, _ROW * len(values), label)
    for row, (name, value) in enumerate(values.items()):
        middle = (row + 0.5) * _ROW
        width = room * value / top
        drawing.text(left - 8, middle + FONT / 3, name, "end", cls="f-ink")
        drawing.add("rect", x=left, y=middle - 7, width=max(width, 1), height=14, cls="f-accent")
        drawing.text(left + width + 6, middle + FONT / 3, texts[name])
    return drawing.markup()


def histogram(
    values: Sequence[float],
    label: str,
    xlabel: str,
    mark: tuple[float, str] | None = None,
    most: int = 40,
) -> Markup:
    """How often whole numbers occur, in at most `most` bins of equal width.

    Args:
      mark: (value, name) of a line across it.
    """
    counts_of = np.asarray(values)
    low, high = int(counts_of.min()), int(counts_of.max())
    width = max(1, -(-(high - low + 1) // most))
    counts = np.bincount((counts_of.astype(int) - low) // width)
    end = low + width * len(counts)
    if mark is not None:
        low, end = min(low, int(mark[0])), max(end, int(mark[0]) + 1)
    height, left, bottom = 190.0, 46.0, 156.0
    across = Scale(low - 0.5, end - 0.5, left, WIDTH - 12)
    up = Scale(0, counts.max() * 1.05, bottom, 14)
    drawing = Drawing(WIDTH, height, label)
    for tick in nice_ticks(0, up.high, 3):
        drawing.line(left, up(tick), WIDTH - 12, up(tick), "s-line")
        drawing.text(left - 5, up(tick) + FONT / 3, wording.short(tick), "end")
    start = int(counts_of.min())
    for number, count in enumerate(counts):
        first = start + number * width
        x0, x1 = across(first - 0.5), across(first + width - 0.5)
        span = f"{first:,}" if width == 1 else f"{first:,} to {first + width - 1:,}"
        drawing.add(
            "rect",
            title=f"{span} {xlabel}: {count:,}",
            x=x0,
            y=up(count),
            width=max(x1 - x0 - 1, 0.5),
            height=bottom - up(count),
            cls="f-accent",
        )
    for tick in (t for t in nice_ticks(low, end, 5) if t == int(t) and low <= t <= end - 1):
        drawing.text(across(tick), bottom + 15, wording.short(tick), "middle")
    drawing.line(left, bottom, WIDTH - 12, bottom, "s-pale")
    drawing.text((left + WIDTH - 12) / 2, height - 4, xlabel, "middle")
    if mark is not None:
        place = across(mark[0])
        drawing.line(place, 14, place, bottom, "s-bad dotted")
        drawing.text(place - 4, 12, mark[1], "end", cls="f-bad")
    return drawing.markup()


def reliability(
    counts: Int[np.ndarray, " bins"],
    confidence: Float[np.ndarray, " bins"],
    accuracy: Float[np.ndarray, " bins"],
    label: str,
) -> Markup:
    """How often the model is right where it is so sure; on the diagonal it is calibrated.

    Args:
      counts, confidence, accuracy: of bins of equal width of the confidence.
    """
    size, left, bottom = 300.0, 46.0, 262.0
    across, up = Scale(0, 1, left, size - 6), Scale(0, 1, bottom, 12)
    drawing = Drawing(size, 300, label)
    for tick in (0, 0.25, 0.5, 0.75, 1):
        drawing.line(left, up(tick), size - 6, up(tick), "s-line")
        drawing.text(left - 5, up(tick) + FONT / 3, f"{100 * tick:g}\N{NO-BREAK SPACE}%", "end")
        drawing.text(across(tick), bottom + 15, f"{100 * tick:g}", "middle")
    width = 1 / len(counts)
    for number in np.flatnonzero(counts):
        title = (
            f"{counts[number]:,} images with confidence about {wording.percent(confidence[number])}"
            f": {wording.percent(accuracy[number])} right"
        )
        height = max(bottom - up(accuracy[number]), 1)
        x0, x1 = across(number * width) + 1, across((number + 1) * width) - 1
        place = {"x": x0, "y": bottom - height, "width": x1 - x0, "height": height}
        drawing.add("rect", title=title, cls="f-accent", **place)
    for cls in ("s-ground halo", "s-ink dotted"):
        drawing.line(across(0), up(0), across(1), up(1), cls)
    drawing.line(left, bottom, size - 6, bottom, "s-pale")
    drawing.text((left + size) / 2, 296, "confidence, %", "middle")
    return drawing.markup()


def confusion_map(
    counts: Int[np.ndarray, "classes classes"],
    names: Sequence[str],
    rows: Sequence[int],
    columns: Sequence[int],
    label: str,
) -> Markup:
    """A confusion matrix: a row for each true class, a column for each that was predicted.

    A cell is as dark as its share of its row is large (by the square root, so that single errors
    are seen). Right ones and errors have a color each; a pointer over a cell says what it is.

    Args:
      rows, columns: the classes that are drawn.
    """
    shown = [name if len(name) <= 30 else f"{name[:29]}…" for name in names]
    margin = min(max(text_width(name, 10) for name in shown), 175) + 8
    width, height = _CELL * len(columns), _CELL * len(rows)
    drawing = Drawing(margin + width + 2, margin + height + 2, label, natural=True)
    drawing.add("rect", x=margin, y=margin, width=width, height=height, cls="f-ground s-line")
    for place, number in enumerate(rows):
        middle = margin + (place + 0.5) * _CELL
        drawing.text(margin - 4, middle + 3.5, shown[number], "end", cls="f-pale tiny")
        drawing.line(margin, middle - _CELL / 2, margin + width, middle - _CELL / 2, "s-line thin")
    for place, number in enumerate(columns):
        middle = margin + (place + 0.5) * _CELL
        turn = f"translate({middle + 3.5:.1f} {margin - 4:.1f}) rotate(-90)"
        drawing.text(0, 0, shown[number], cls="f-pale tiny", transform=turn)
        drawing.line(middle - _CELL / 2, margin, middle - _CELL / 2, margin + height, "s-line thin")
    totals = np.maximum(counts.sum(axis=1), 1)
    for down, across in np.argwhere(counts[np.ix_(rows, columns)]):
        row, column = rows[down], columns[across]
        count, share = counts[row, column], counts[row, column] / totals[row]
        drawing.add(
            "rect",
            title=f"{names[row]}, taken for {names[column]}: {count:,} of {totals[row]:,}",
            x=margin + across * _CELL + 0.5,
            y=margin + down * _CELL + 0.5,
            width=_CELL - 1,
            height=_CELL - 1,
            fill_opacity=0.25 + 0.75 * float(share) ** 0.5,
            cls="f-accent" if row == column else "f-bad",
        )
    return drawing.markup()

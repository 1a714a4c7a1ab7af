"""Charts on matplotlib axes, the same for the pages of `report` and for pictures in PNG files.

An artist's gid "title:TEXT" (set by `tell`) becomes what a pointer over it shows on a page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, PercentFormatter

from vlp_jax.observe.palette import ACCENT, BAD, INK, LINE, PALE, SERIES

TELLS = "title:"
SEPARATOR = "\N{SYMBOL FOR UNIT SEPARATOR}"  # between texts; XML would lose a line break
_DASHES = ("-", (0, (6, 3)), (0, (2, 3)), (0, (8, 3, 2, 3)), (0, (1, 3)), (0, (10, 4)))
_MOST_POINTS = 300  # of a curve on a page
FEW_POINTS = 25  # of a curve; up to here each of them is marked
_MOST_BINS = 40
_LOG_FROM = 100.0  # two decades: on a linear scale most of the curve would lie on the axis


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve: finite values at ascending steps, and perhaps a level such as chance to mark."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    level: float | None = None


def style(axes: Axes, font: float, grid: bool = False) -> None:
    """Sets thin axes on two sides, and labels of `font` points; `grid` for lines at the ticks."""
    axes.patch.set_visible(False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["left"].set_visible(not grid)
    axes.spines[["left", "bottom"]].set(color=PALE, linewidth=font / 12)
    axes.tick_params(labelsize=font, length=0 if grid else font / 3, width=font / 12)
    axes.tick_params(color=PALE, labelcolor=PALE if grid else INK, pad=font / 3)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=font, color=PALE if grid else INK)
    if grid:
        axes.grid(axis="y", color=LINE, linewidth=1)
        axes.set_axisbelow(True)


def look(number: int) -> dict[str, Any]:
    """Returns the color and the dashes of a curve; the first 36 curves differ."""
    # Dashes differ from curve to curve as well, for those who do not tell the colors apart.
    dashes = _DASHES[(number + number // len(SERIES)) % len(_DASHES)]
    return {"color": SERIES[number % len(SERIES)], "linestyle": dashes}


def tell(artist: Artist, *texts: str) -> None:
    """Has a page show a text for a pointer over an artist, or over each marker of a curve."""
    artist.set_gid(TELLS + SEPARATOR.join(texts))


def plot(axes: Axes, number: int, curve: Series, width: float = 1.3) -> Line2D:
    """Draws a curve with the look of its number, and its level; few points are marked each."""
    # More points than pixels only make a page large.
    steps, values = thinned(curve.steps, curve.values)
    # Not clipped: the last marker stands on the edge of the axes.
    more = {"linewidth": width, "label": curve.name, "clip_on": False}
    (line,) = axes.plot(steps, values, **more, **look(number))
    if curve.level is not None:
        color = SERIES[number % len(SERIES)]
        axes.axhline(curve.level, color=color, linewidth=0.75 * width, linestyle=(0, (2, 4)))
    if len(steps) <= FEW_POINTS:
        line.set(marker="o", markersize=3 * width, markeredgewidth=0)
    return line


def scale(axes: Axes, values: Sequence[float], share: bool = False, log: bool = False) -> None:
    """Chooses the vertical axis for values: `share` in percent, `log` if they span much."""
    finite = [value for value in values if math.isfinite(value)]
    low, high = min(finite), max(finite)
    if share:
        axes.set_ylim(0, 1.02 * max(1.0, high))
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[2.5, 5, 10]))
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, 0, "\N{NO-BREAK SPACE}%"))
    elif log and low > 0 and high / low >= _LOG_FROM:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(numticks=5))
        axes.yaxis.set_minor_locator(LogLocator(subs=(), numticks=1))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    else:
        axes.margins(y=0.04)
        if 0 <= low < 0.5 * high:
            axes.set_ylim(bottom=0)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))


def steps_axis(axes: Axes, last: float, label: str = "steps") -> None:
    """Has the horizontal axis end at the last step, and begin at 0 unless that is far."""
    first = axes.dataLim.x0
    axes.set_xlim(first if 0.5 * last <= first < last else 0, last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axes.set_xlabel(label)


def legend(axes: Axes, font: float) -> None:
    """Names the curves in their colors above the axes."""
    axes.legend(
        alignment="left",
        loc="lower left",
        bbox_to_anchor=(-0.04, 1.0),
        frameon=False,
        fontsize=font,
        labelcolor="linecolor",
        handlelength=1.6,
        handletextpad=0.4,
        labelspacing=0.25,
        borderpad=0.1,
        borderaxespad=0.2,
    )


def bars(
    axes: Axes, values: Mapping[str, float], texts: Sequence[str], font: float, color: str = ACCENT
) -> None:
    """Draws horizontal bars with their names before them and `texts` behind them."""
    places = np.arange(len(values))
    axes.barh(places, list(values.values()), color=color, height=0.6)
    style(axes, font)
    axes.grid(visible=False)
    axes.spines[["left", "bottom"]].set_visible(False)
    for place, (value, text) in enumerate(zip(values.values(), texts)):
        offset = {"xytext": (font / 2, 0), "textcoords": "offset points"}
        axes.annotate(text, (value, place), **offset, fontsize=font, color=PALE, va="center")
    axes.set_yticks(places, list(values), parse_math=False)
    axes.set_ylim(len(values) - 0.5, -0.5)
    axes.set_xlim(0, max(*values.values(), 1e-12))
    axes.set_xticks([])
    axes.tick_params(length=0)


def histogram(
    axes: Axes,
    values: Sequence[float],
    label: str,
    *,
    color: str = ACCENT,
    mark: tuple[float, str] | None = None,
    font: float = 12,
) -> None:
    """Draws how often numbers occur, in at most 40 bins of equal width.

    Bins of whole numbers are as wide as a whole number. A few values far beyond the rest are
    counted in the last bin.

    Args:
      label: the unit, beneath the axis.
      mark: (value, name) of a line across it.
      font: points of the name of the mark.
    """
    numbers = np.asarray(values)
    low, high = numbers.min(), numbers.max()
    usual = np.percentile(numbers, 99.5)
    high = high if high <= 2 * usual else usual
    if np.issubdtype(numbers.dtype, np.integer):
        width = max(1, math.ceil((high - low + 1) / _MOST_BINS))
        edges = np.arange(low, math.floor(high) + width + 1, width) - 0.5
    else:
        width, edges = 0, np.linspace(low, high if high > low else low + 1, _MOST_BINS + 1)
    counts = np.histogram(np.minimum(numbers, edges[-1]), edges)[0]
    drawn = axes.bar(edges[:-1], counts, 0.9 * np.diff(edges), align="edge", color=color)
    for number, (count, start, bar) in enumerate(zip(counts, edges, drawn)):
        first = math.ceil(start)
        span = f"{first:,}" if width == 1 else f"{first:,} to {math.ceil(start + width) - 1:,}"
        if number == len(counts) - 1 and high < numbers.max():
            span = f"{first:,} and more"
        tell(bar, f"{span} {label}: {count:,}")
    axes.set_xlabel(label)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True, steps=[1, 2, 5, 10]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    if mark is not None:
        place, name = mark
        axes.axvline(place, color=BAD, linewidth=font / 8, linestyle=(0, (2, 3)))
        right = place > np.mean(axes.get_xlim())
        offset = {"xytext": (0, font / 4), "textcoords": "offset points"}
        where = {"xycoords": axes.get_xaxis_transform(), "ha": "right" if right else "left"}
        axes.annotate(name, (place, 1), **where, **offset, fontsize=font, color=BAD)


def thinned(
    steps: Sequence[float], values: Sequence[float], most: int = _MOST_POINTS
) -> tuple[Float[np.ndarray, " points"], Float[np.ndarray, " points"]]:
    """Returns at most `most` finite points of a curve: highest and lowest in every part."""
    x, y = np.asarray(steps, float), np.asarray(values, float)
    keep = np.isfinite(y)
    x, y = x[keep], y[keep]
    if len(x) <= most:
        return x, y
    chosen = {0, len(x) - 1}
    for part in np.array_split(np.arange(len(x)), (most - 2) // 2):
        chosen |= {int(part[y[part].argmin()]), int(part[y[part].argmax()])}
    order = sorted(chosen)
    return x[order], y[order]


def short(value: float) -> str:
    """Writes a tick of an axis: 1000 -> "1k", 0.00001 -> "1e-5"."""
    for bound, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= bound:
            return f"{value / bound:g}{letter}"
    if value and abs(value) < 1e-3:
        mantissa, _, exponent = f"{value:e}".partition("e")
        return f"{round(float(mantissa), 3):g}e{int(exponent)}"
    return f"{value:.6g}"

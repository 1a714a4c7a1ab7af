"""PNG files of runs side by side, and of training data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib.axes import Axes

from vlp_jax.observe import charts
from vlp_jax.observe.palette import BAD, INK, PALE, SERIES
from vlp_jax.observe.plots import Curve
from vlp_jax.observe.sheet import GAP, TOP, Colored, Sheet, picture_grid

_FONT, _SMALL = 7.5, 6.5  # points
_WIDTH, _ROW = 10.0, 2.1  # inches: the statistics of data, and the panels of a source
_MOST_SIZES = 5_000  # more sizes of images would hide each other


def draw_differences(
    path: epath.PathLike,
    curves: Mapping[str, Sequence[Curve]],
    *,
    baseline: str,
    title: str,
    subtitle: str,
    ylabel: str,
) -> None:
    """Writes a PNG with the curves of variants, and beside it their differences from a baseline.

    A curve is the mean over the runs of a variant, in a band from the least to the most. A variant
    that was logged at other steps than the baseline has no curve of differences.

    Args:
      curves: variant -> (steps, values) of each of its runs; runs at the same place in the lists
        belong together, and all of a variant have the same steps.
      baseline: the variant that is subtracted.
      ylabel: the name of the values.

    Raises:
      ValueError: the variants have different numbers of runs, or a variant's were logged at
        different steps.
    """
    logged = {name: {tuple(np.asarray(run[0])) for run in runs} for name, runs in curves.items()}
    numbers = {len(runs) for runs in curves.values()}
    if len(numbers) > 1 or any(len(found) > 1 for found in logged.values()):
        raise ValueError("numbers of runs differ, or the steps at which a variant's were logged")
    steps = {name: np.asarray(*found) for name, found in logged.items()}
    values = {name: np.asarray([run[1] for run in runs]) for name, runs in curves.items()}
    sheet = Sheet(8.0, 3.9, title, subtitle)
    left, right = (sheet.axes(x, 0.78, 3.2, 2.6) for x in (0.6, 4.6))
    for axes in (left, right):
        charts.style(axes, _FONT)
    for number, (name, of_runs) in enumerate(values.items()):
        shown = [(left, of_runs)]
        if name != baseline and logged[name] == logged[baseline]:
            shown.append((right, of_runs - values[baseline]))
        for axes, each in shown:
            look = charts.look(number)
            axes.plot(steps[name], each.mean(0), linewidth=1.2, label=name, **look)
            band = each.min(0), each.max(0)
            axes.fill_between(steps[name], *band, color=look["color"], alpha=0.2, linewidth=0)
    right.axhline(0, color=PALE, linewidth=0.9, linestyle=":")
    left.set_ylabel(ylabel)
    right.set_ylabel(f"{ylabel}, minus {baseline}")
    charts.steps_axis(left, max(each[-1] for each in steps.values()))
    charts.steps_axis(right, steps[baseline][-1])
    left.legend(frameon=False, fontsize=8, loc="upper right")
    sheet.save(path)


def draw_contact_sheet(
    path: epath.PathLike,
    images: UInt8[np.ndarray, "images height width 3"],
    captions: Sequence[Sequence[str]],
    *,
    title: str,
    subtitle: str,
) -> int:
    """Writes a PNG of images with their text beneath, wrapped; too long a text loses its end.

    `captions` are the paragraphs of each image: the first in ink, the rest pale. Returns how many
    characters the installed fonts lack; they are drawn as boxes.

    Raises:
      ValueError: no image, or another number of captions.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions cannot be drawn")
    paragraphs = [
        [Colored(text, PALE if number else INK) for number, text in enumerate(caption)]
        for caption in captions
    ]
    layout = {"across": 8, "side": 1.25, "text_height": 1.5}
    return picture_grid(list(images), paragraphs, title, subtitle, **layout)[0].save(path)


def draw_statistics(
    path: epath.PathLike, sources: Mapping[str, Mapping[str, Any]], *, title: str, subtitle: str
) -> None:
    """Writes a PNG with a row of panels for each source: texts, images, bytes, bad examples.

    Args:
      sources: name -> `tokens`, `encoded_bytes` (numbers), `sizes` ((width, height) pairs), each
        of which may be empty, `context_length` (None for no text), `bad` (reason -> count) and
        `read`, how many examples were looked at.

    Raises:
      ValueError: no source.
    """
    if not sources:
        raise ValueError("there is no source to draw")
    panels = (_draw_tokens, _draw_sizes, _draw_bytes, _draw_bad)
    sheet, pitch = Sheet(_WIDTH, _ROW * len(sources) + TOP, title, subtitle), _WIDTH / len(panels)
    for number, (name, found) in enumerate(sources.items()):
        top = TOP + number * _ROW
        sheet.text(GAP, top + 0.14, name, 8.5, weight="bold")
        for place, draw in enumerate(panels):
            indent = 0.5 if draw is _draw_bad else 0.0  # room for the reasons
            left = 0.5 + place * pitch + indent
            axes = sheet.axes(left, top + 0.4, pitch - 0.75 - indent, _ROW - 0.85)
            charts.style(axes, _SMALL)
            draw(axes, found)
    sheet.save(path)


def _draw_tokens(axes: Axes, found: Mapping[str, Any]) -> None:
    tokens, context, mark = np.asarray(found["tokens"]), found["context_length"], None
    if _has(axes, tokens, "no text"):
        if context is not None:
            mark = context, f"context {context}: {(tokens > context).mean():.1%} are cut"
        charts.histogram(axes, tokens, "tokens of a text", color=SERIES[0], mark=mark, font=_SMALL)
        axes.set_ylabel("examples")


def _draw_sizes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["sizes"], "no image"):
        widths, heights = np.asarray(found["sizes"], float)[:_MOST_SIZES].T
        axes.scatter(widths, heights, s=3, alpha=0.4, color=SERIES[2], linewidths=0)
        axes.set(xlabel="width, pixels", ylabel="height, pixels")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)


def _draw_bytes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["encoded_bytes"], "no encoded image"):
        kilobytes = np.asarray(found["encoded_bytes"]) / 1000
        charts.histogram(axes, kilobytes, "encoded image, kB", color=SERIES[4], font=_SMALL)
        axes.set_ylabel("examples")


def _draw_bad(axes: Axes, found: Mapping[str, Any]) -> None:
    reasons, read = dict(found["bad"]), f"{found['read']:,}"
    if _has(axes, reasons, f"none of {read} is bad"):
        charts.bars(axes, reasons, [f"{count:,}" for count in reasons.values()], _SMALL, BAD)
        axes.set_ylim(max(len(reasons) - 0.5, 2.5), -0.5)  # a single bar is not a block
        axes.set_xlabel(f"bad examples of {read}")


def _has(axes: Axes, values: Any, nothing: str) -> bool:
    """Returns whether there is something to draw; if not, writes `nothing`."""
    if not len(values):
        axes.set_axis_off()
        axes.text(0.5, 0.5, nothing, fontsize=7, color=PALE, ha="center", transform=axes.transAxes)
    return bool(len(values))

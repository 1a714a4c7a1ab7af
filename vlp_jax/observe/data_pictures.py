"""Pictures of training data as PNG files: what a model sees, and how its sources are made up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib.axes import Axes

from vlp_jax.observe import charts
from vlp_jax.observe.palette import BAD, INK, PALE, SERIES
from vlp_jax.observe.sheet import GAP, TOP, Sheet, picture_grid
from vlp_jax.observe.text_layout import Colored

_FONT = 6.5  # points
_WIDTH, _ROW = 10.0, 2.1  # inches: the sheet, and the height of the panels of a source
_MOST_POINTS = 5_000  # more sizes of images would hide each other


def draw_contact_sheet(
    path: epath.PathLike,
    images: UInt8[np.ndarray, "images height width 3"],
    captions: Sequence[Sequence[str]],
    *,
    title: str,
    subtitle: str,
) -> int:
    """Writes a PNG of images with their text beneath, wrapped; too long a text loses its end.

    Args:
      path: the PNG; its folder is made.
      captions: of each image, its paragraphs: the first in ink, the rest pale.
      title, subtitle: a line each.

    Returns:
      how many characters the installed fonts lack; they are drawn as boxes.

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
      path: the PNG; its folder is made.
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
            charts.style(axes, _FONT)
            draw(axes, found)
    sheet.save(path)


def _draw_tokens(axes: Axes, found: Mapping[str, Any]) -> None:
    tokens, context, mark = np.asarray(found["tokens"]), found["context_length"], None
    if _has(axes, tokens, "no text"):
        if context is not None:
            mark = context, f"context {context}: {(tokens > context).mean():.1%} are cut"
        charts.histogram(axes, tokens, "tokens of a text", color=SERIES[0], mark=mark, font=_FONT)
        axes.set_ylabel("examples")


def _draw_sizes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["sizes"], "no image"):
        widths, heights = np.asarray(found["sizes"], float)[:_MOST_POINTS].T
        axes.scatter(widths, heights, s=3, alpha=0.4, color=SERIES[2], linewidths=0)
        axes.set(xlabel="width, pixels", ylabel="height, pixels")
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)


def _draw_bytes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["encoded_bytes"], "no encoded image"):
        kilobytes = np.asarray(found["encoded_bytes"]) / 1000
        charts.histogram(axes, kilobytes, "encoded image, kB", color=SERIES[4], font=_FONT)
        axes.set_ylabel("examples")


def _draw_bad(axes: Axes, found: Mapping[str, Any]) -> None:
    reasons, read = dict(found["bad"]), f"{found['read']:,}"
    if _has(axes, reasons, f"none of {read} is bad"):
        charts.bars(axes, reasons, [f"{count:,}" for count in reasons.values()], _FONT, BAD)
        axes.set_ylim(max(len(reasons) - 0.5, 2.5), -0.5)  # a single bar is not a block
        axes.set_xlabel(f"bad examples of {read}")


def _has(axes: Axes, values: Any, nothing: str) -> bool:
    """Returns whether there is something to draw; if not, writes `nothing`."""
    if not len(values):
        axes.set_axis_off()
        axes.text(0.5, 0.5, nothing, fontsize=7, color=PALE, ha="center", transform=axes.transAxes)
    return bool(len(values))

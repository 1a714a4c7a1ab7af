"""Pictures of training data as PNG files: what a model sees, and how its sources are made up."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vlp_jax.observe.plots import CURVE_COLORS, INK, PALE, WRONG, new_figure, save_figure
from vlp_jax.observe.text_layout import LINE_SPACING, Colored, TextFitter

# Fonts for what DejaVu Sans, matplotlib's own, does not have; those that are installed are used.
FALLBACK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Noto Sans Arabic",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Sans Hebrew",
    "Arial Unicode MS",
    "Noto Emoji",
)
_ACROSS = 8  # images side by side
_CELL, _GAP, _TOP = 1.25, 0.1, 0.6  # inches: an image, between images, titles
_TEXT, _FONT = 1.5, 6.5  # inches, at most, and points: what is written under an image
_LINE = _FONT * LINE_SPACING / 72  # inches
_PANELS = 4
_MOST_BINS = 40


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
      path: the PNG; its directory is made.
      captions: of each image, its paragraphs: the first in ink, the others pale.
      title, subtitle: a line each.

    Returns:
      how many characters the installed fonts lack; they are drawn as boxes.

    Raises:
      ValueError: no image, or another number of captions.
    """
    if not len(images) or len(images) != len(captions):
        raise ValueError(f"{len(images)} images and {len(captions)} captions cannot be drawn")
    with _fonts() as missing:
        save_figure(_contact_sheet(images, captions, title, subtitle), path)
    return len(missing)


def _contact_sheet(
    images: np.ndarray, captions: Sequence[Sequence[str]], title: str, subtitle: str
) -> Figure:
    paragraphs = [
        [Colored(text, PALE if n else INK) for n, text in enumerate(caption) if text.strip()]
        for caption in captions
    ]
    measured = TextFitter(new_figure((1, 1)))
    lines = [measured.lay_out(caption, _FONT, _CELL, _TEXT)[0] for caption in paragraphs]
    text = (max(map(len, lines)) + 0.5) * _LINE
    across = min(_ACROSS, len(images))
    down = -(-len(images) // across)
    width = max(across * (_CELL + _GAP) + _GAP, 4.0)
    height = down * (_CELL + text + _GAP) + _TOP
    figure = new_figure((width, height))
    _titles(figure, TextFitter(figure), title, subtitle)
    for index, image in enumerate(images):
        row, column = divmod(index, across)
        left = _GAP + column * (_CELL + _GAP)
        bottom = height - _TOP - row * (_CELL + text + _GAP) - _CELL
        axes = figure.add_axes((left / width, bottom / height, _CELL / width, _CELL / height))
        axes.imshow(image, interpolation="nearest", aspect="equal")
        axes.set_axis_off()
        for number, line in enumerate(lines[index]):
            x, y = left / width, (bottom - 0.03 - (number + 0.8) * _LINE) / height
            figure.text(x, y, line.text, fontsize=_FONT, color=line.color, parse_math=False)
    return figure


def draw_statistics(
    path: epath.PathLike, sources: Mapping[str, Mapping[str, Any]], *, title: str, subtitle: str
) -> None:
    """Writes a PNG with a row of panels for each source: texts, images, bytes, what is bad.

    Args:
      path: the PNG; its directory is made.
      sources: name -> `tokens`, `encoded_bytes` (numbers), `sizes` ((width, height) pairs), each
        of which may be empty, `context_length` (None for no text), `bad` (reason -> count) and
        `read`, how many examples were looked at.

    Raises:
      ValueError: no source.
    """
    if not sources:
        raise ValueError("there is no source to draw")
    width, row, top = 10.0, 2.1, _TOP
    height = row * len(sources) + top
    with _fonts():
        figure = new_figure((width, height))
        _titles(figure, TextFitter(figure), title, subtitle)
        for number, (name, found) in enumerate(sources.items()):
            bottom = (height - top - (number + 1) * row + 0.45) / height
            panels = (_draw_tokens, _draw_sizes, _draw_bytes, _draw_bad)
            for place, draw in enumerate(panels):
                left = (0.45 + place * (width - 0.3) / _PANELS) / width
                box = (left, bottom, (width / _PANELS - 0.65) / width, (row - 0.85) / height)
                axes = figure.add_axes(box)
                _style(axes)
                draw(axes, found)
            figure.text(
                0.12 / width,
                bottom + (row - 0.85 + 0.22) / height,
                name,
                fontsize=8.5,
                weight="bold",
                color=INK,
                parse_math=False,
            )
        save_figure(figure, path)


def _draw_tokens(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["tokens"], "no text"):
        _draw_histogram(axes, np.asarray(found["tokens"]), CURVE_COLORS[0], whole=True)
        axes.set_xlabel("tokens of a text", fontsize=6.5, labelpad=1.5)
        context = found["context_length"]
        if context is not None:
            axes.axvline(context, color=WRONG, linewidth=1, linestyle="--")
            share = (np.asarray(found["tokens"]) > context).mean()
            _note(axes, f"context {context}: {share:.1%} are cut")


def _draw_sizes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["sizes"], "no image"):
        widths, heights = np.asarray(found["sizes"], float)[:5000].T
        axes.scatter(widths, heights, s=3, alpha=0.4, color=CURVE_COLORS[2], linewidths=0)
        axes.set_xlabel("width, pixels", fontsize=6.5, labelpad=1.5)
        axes.set_ylabel("height, pixels", fontsize=6.5, labelpad=1.5)
        axes.set_xlim(left=0)
        axes.set_ylim(bottom=0)


def _draw_bytes(axes: Axes, found: Mapping[str, Any]) -> None:
    if _has(axes, found["encoded_bytes"], "no encoded image"):
        _draw_histogram(axes, np.asarray(found["encoded_bytes"]) / 1000, CURVE_COLORS[4])
        axes.set_xlabel("encoded image, kB", fontsize=6.5, labelpad=1.5)


def _draw_bad(axes: Axes, found: Mapping[str, Any]) -> None:
    reasons = dict(found["bad"])
    if _has(axes, reasons, f"none of {found['read']:,} is bad"):
        axes.barh(list(reasons), list(reasons.values()), color=WRONG, height=0.6)
        for place, count in enumerate(reasons.values()):
            axes.text(count, place, f" {count:,}", fontsize=6, va="center")
        axes.set_ylim(len(reasons) - 0.5 if len(reasons) > 3 else 2.5, -0.5)
        axes.set_xlim(0, 1.2 * max(reasons.values()))
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        box = axes.get_position()  # room for the names
        axes.set_position((box.x0 + 0.06, box.y0, box.width - 0.06, box.height))
        axes.set_xlabel(f"bad ones of {found['read']:,}", fontsize=6.5, labelpad=1.5)


def _has(axes: Axes, values: Any, nothing: str) -> bool:
    """Whether there is something to draw; if not, says so."""
    if not len(values):
        axes.set_axis_off()
        axes.text(0.5, 0.5, nothing, fontsize=7, color=PALE, ha="center", transform=axes.transAxes)
    return bool(len(values))


def _draw_histogram(axes: Axes, values: np.ndarray, color: str, whole: bool = False) -> None:
    """`whole` numbers get bins that are as wide as a whole number."""
    top = np.percentile(values, 99.5)  # the last bin takes what lies beyond
    bins: Any = _MOST_BINS
    if whole:
        top = np.ceil(top)
        step = max(1, np.ceil((top + 1) / _MOST_BINS))
        bins = np.arange(0, top + 1 + step, step) - 0.5
    axes.hist(np.minimum(values, top), bins=bins, color=color)
    axes.set_ylabel("examples", fontsize=6.5, labelpad=1.5)


def _note(axes: Axes, text: str) -> None:
    axes.text(1, 1.02, text, fontsize=6, color=WRONG, ha="right", transform=axes.transAxes)


def _style(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=PALE, linewidth=0.6)
    axes.tick_params(labelsize=6, length=2, width=0.5, color=PALE, labelcolor=INK, pad=1.5)


def _titles(figure: Figure, fitter: TextFitter, title: str, subtitle: str) -> None:
    width, height = figure.get_size_inches()
    for text, sizes, weight, color, drop in (
        (title, (11, 10, 9, 8, 7, 6), "bold", INK, 0.09),
        (subtitle, (7.5, 7, 6.5, 6, 5.5, 5), "normal", PALE, 0.31),
    ):
        size = fitter.largest_size(text, width - 2 * _GAP, sizes, weight)
        x, y = _GAP / width, 1 - drop / height
        figure.text(
            x, y, text, fontsize=size, color=color, va="top", weight=weight, parse_math=False
        )


@contextlib.contextmanager
def _fonts() -> Iterator[set[str]]:
    """Draws with the fallback fonts that are installed; gives the glyphs that none of them has."""
    installed = set(font_manager.get_font_names())
    family = ["DejaVu Sans", *(name for name in FALLBACK_FONTS if name in installed)]
    missing: set[str] = set()

    def note(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
        if "missing from" in str(message):
            missing.add(str(message))
        else:
            show(message, category, *place, **more)

    with matplotlib.rc_context({"font.family": family}), warnings.catch_warnings():
        warnings.filterwarnings("always", message="Glyph .* missing from")
        show, warnings.showwarning = warnings.showwarning, note
        yield missing

"""A picture on which things are placed in inches from the upper left corner, written as a PNG.

Text is wrapped by measured widths of glyphs, so that it fits its box.

Matplotlib's object interface on the Agg canvas: no pyplot, no display, no global state.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

from vlp_jax.observe.palette import INK, PALE

DPI = 200
GAP, TOP = 0.12, 0.62  # inches: between pictures and at the edges; room of the two titles
FONT = 7.0  # points of a caption

Image = UInt8[np.ndarray, "height width 3"]


# DejaVu Sans, which matplotlib brings along, has no glyphs of these scripts.
_FALLBACK_FONTS = (
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
LINE_SPACING = 1.22  # of the font size
ELLIPSIS = "…"


@dataclasses.dataclass(frozen=True)
class Colored:
    """A paragraph, or one line of it, of one color."""

    text: str
    color: str


@functools.cache
def font_families() -> tuple[str, ...]:
    """DejaVu Sans and the installed fallback fonts, in the order in which glyphs are sought."""
    installed = set(font_manager.get_font_names())
    return ("DejaVu Sans", *(name for name in _FALLBACK_FONTS if name in installed))


class TextFitter:
    """Measures text as `figure` will draw it."""

    def __init__(self, figure: Figure):
        canvas = figure.canvas
        if not isinstance(canvas, FigureCanvasAgg):
            canvas = FigureCanvasAgg(figure)
        self._renderer = canvas.get_renderer()
        self._dpi = figure.dpi
        self._widths: dict[tuple[str, float, str], float] = {}

    def width(self, text: str, font_size: float, weight: str = "normal") -> float:
        """Returns the width of a text in inches at `font_size` points."""
        key = (text, font_size, weight)
        if key not in self._widths:
            font = FontProperties(family=font_families(), size=font_size, weight=weight)
            with warnings.catch_warnings():  # a missing glyph is told once, by `Sheet.save`
                warnings.simplefilter("ignore")
                measured = self._renderer.get_text_width_height_descent(text, font, ismath=False)
            self._widths[key] = measured[0] / self._dpi
        return self._widths[key]

    def wrap(self, text: str, font_size: float, width: float) -> list[str]:
        """Breaks text into lines of at most `width` inches, inside a word only if it is longer."""
        lines: list[str] = []
        current = ""
        for word in text.split():
            joined = f"{current} {word}".strip()
            if self.width(joined, font_size) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            while self.width(word, font_size) > width and len(word) > 1:
                head = self._longest_head(word, font_size, width)
                lines.append(head)
                word = word[len(head) :]
            current = word
        return [*lines, current] if current else lines

    def lay_out(
        self, paragraphs: Sequence[Colored], font_size: float, width: float, height: float
    ) -> tuple[list[Colored], bool]:
        """Wraps paragraphs into a box of `width` by `height` inches.

        Returns the lines, and True if they hold the whole text. Where they do not, every paragraph
        keeps a fair share of the lines and a cut one ends in an ellipsis.
        """
        room = max(int(height * 72 / (font_size * LINE_SPACING)), len(paragraphs))
        wrapped = [self.wrap(paragraph.text, font_size, width) for paragraph in paragraphs]
        complete = sum(map(len, wrapped)) <= room
        lines: list[Colored] = []
        for index, (paragraph, texts) in enumerate(zip(paragraphs, wrapped, strict=True)):
            others = sum(map(len, wrapped[index + 1 :]))
            share = (room - len(lines)) // (len(paragraphs) - index)
            allowed = max(share, room - len(lines) - others)
            # What later paragraphs do not need is left to this one.
            if len(texts) > allowed:
                texts = [*texts[: allowed - 1], self._cut(texts[allowed - 1], font_size, width)]
            lines += [Colored(text, paragraph.color) for text in texts]
        return lines, complete

    def largest_size(
        self, text: str, width: float, sizes: Sequence[float], weight: str = "normal"
    ) -> float:
        """Returns the first of `sizes` (descending) at which `text` is one line of `width`."""
        for size in sizes:
            if self.width(text, size, weight) <= width:
                return size
        return sizes[-1]

    def _longest_head(self, word: str, font_size: float, width: float) -> str:
        head = word[:1]
        for end in range(2, len(word)):
            if self.width(word[:end], font_size) > width:
                break
            head = word[:end]
        return head

    def _cut(self, line: str, font_size: float, width: float) -> str:
        while line and self.width(line + ELLIPSIS, font_size) > width:
            line = line[:-1]
        return line.rstrip() + ELLIPSIS


class Sheet:
    """A white figure of `width` by `height` inches with a title and a subtitle."""

    def __init__(self, width: float, height: float, title: str, subtitle: str) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI, facecolor="white")
        FigureCanvasAgg(self.figure)
        self.fitter = TextFitter(self.figure)
        room = width - 2 * GAP
        size = self.fitter.largest_size(title, room, (11, 10, 9, 8, 7, 6), "bold")
        self.text(GAP, 0.09, title, size, va="top", weight="bold")
        size = self.fitter.largest_size(subtitle, room, (7.5, 7, 6.5, 6, 5.5, 5))
        self.text(GAP, 0.32, subtitle, size, PALE, va="top")

    def text(
        self, x: float, y: float, text: str, size: float, color: str = INK, **more: Any
    ) -> None:
        """Writes one line; `y` is its base line unless `va` says otherwise."""
        more = {"family": font_families(), "parse_math": False, **more}
        place = x / self.width, 1 - y / self.height
        self.figure.text(*place, text, fontsize=size, color=color, **more)

    def lines(self, x: float, y: float, lines: Sequence[Colored], size: float) -> None:
        """Writes lines below `y`, as `TextFitter.lay_out` gives them."""
        for number, line in enumerate(lines):
            self.text(x, y + (number + 0.8) * line_height(size), line.text, size, line.color)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Adds axes whose upper left corner is at (left, top)."""
        box = (left, self.height - top - height, width, height)
        scale = (self.width, self.height, self.width, self.height)
        return self.figure.add_axes([value / unit for value, unit in zip(box, scale)])

    def picture(
        self, image: Image, left: float, top: float, side: float, color: str = PALE, frame=0.5
    ) -> Axes:
        """Shows an image in a square, with a frame of `frame` points around it."""
        axes = self.axes(left, top, side, side)
        axes.imshow(image, interpolation="antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=frame)
        return axes

    def save(self, path: epath.PathLike) -> int:
        """Writes the PNG; returns how many characters no font has, which are drawn as boxes."""
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        buffer, missing = io.BytesIO(), set()
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            self.figure.savefig(buffer, format="png", dpi=DPI)
        # All other warnings pass on, as if they had not been recorded.
        for one in told:
            if "missing from" in str(one.message):
                missing.add(str(one.message))
            else:
                warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
        path.write_bytes(buffer.getvalue())
        return len(missing)


def line_height(size: float) -> float:
    """Inches from one line of text of `size` points to the next."""
    return size * LINE_SPACING / 72


def picture_grid(
    panels: Sequence[Image | str],
    captions: Sequence[Sequence[Colored] | str],
    title: str,
    subtitle: str,
    *,
    across: int,
    side: float,
    text_height: float = 0.6,
) -> tuple[Sheet, list[Axes]]:
    """Draws pictures in rows, each with its caption beneath it.

    Args:
      panels: images, or texts that stand in the place of an image.
      captions: a text or paragraphs for each; what is too long is cut.
      across: pictures in a row.
      side, text_height: inches of a picture, and of a caption at most.
    """
    # The height of the sheet follows from its captions, so a figure of no size measures them.
    fitter = TextFitter(Figure(dpi=DPI))
    paragraphs = [[Colored(c, INK)] if isinstance(c, str) else c for c in captions]
    lines = [
        fitter.lay_out([p for p in each if p.text.strip()], FONT, side, text_height)[0]
        for each in paragraphs
    ]
    pitch = side + (max(map(len, lines)) + 0.7) * line_height(FONT) + 0.05
    across = min(across, len(panels))
    down = -(-len(panels) // across)
    width = max(across * (side + GAP) + GAP, 5.0)  # room for a title
    sheet, cells = Sheet(width, TOP + down * pitch, title, subtitle), []
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        left, top = GAP + column * (side + GAP), TOP + row * pitch
        if isinstance(panel, str):
            quoted = sheet.fitter.lay_out([Colored(f"“{panel}”", INK)], 9, 0.94 * side, side)[0]
            sheet.lines(left, top + (side - len(quoted) * line_height(9)) / 2, quoted, 9)
            cells.append(sheet.axes(left, top, side, side))
            cells[-1].set_axis_off()
        else:
            cells.append(sheet.picture(panel, left, top, side))
        sheet.lines(left, top + side + 0.04, lines[index], FONT)
    return sheet, cells

"""Text that fits its box in a matplotlib figure, wrapped by measured widths of glyphs."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Sequence

from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

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

        Returns:
          the lines, and True if they hold the whole text. Where they do not, every paragraph keeps
          a fair share of the lines and a cut one ends in an ellipsis.
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

"""Text that is sure to fit its box in a matplotlib figure, wrapped by real glyph widths."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties

LINE_SPACING = 1.22  # of the font size
ELLIPSIS = "…"


@dataclasses.dataclass(frozen=True)
class Colored:
    """A paragraph, or one line of it, of one color."""

    text: str
    color: str


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
        """Width in inches at `font_size` points."""
        key = (text, font_size, weight)
        if key not in self._widths:
            font = FontProperties(size=font_size, weight=weight)
            pixels, _, _ = self._renderer.get_text_width_height_descent(text, font, ismath=False)
            self._widths[key] = pixels / self._dpi
        return self._widths[key]

    def wrap(self, text: str, font_size: float, width: float) -> list[str]:
        """Lines of at most `width` inches, broken between words, or inside one that is longer."""
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
        """The wrapped lines that fit a box in inches, and whether that is all of the text.

        Where it is not, every paragraph keeps a fair share of the lines and ends in an ellipsis.
        """
        room = max(int(height * 72 / (font_size * LINE_SPACING)), len(paragraphs))
        wrapped = [self.wrap(paragraph.text, font_size, width) for paragraph in paragraphs]
        complete = sum(map(len, wrapped)) <= room
        lines: list[Colored] = []
        for index, (paragraph, texts) in enumerate(zip(paragraphs, wrapped, strict=True)):
            others = sum(map(len, wrapped[index + 1 :]))
            share = (room - len(lines)) // (len(paragraphs) - index)
            allowed = max(share, room - len(lines) - others)
            if len(texts) > allowed:
                texts = [*texts[: allowed - 1], self._cut(texts[allowed - 1], font_size, width)]
            lines += [Colored(text, paragraph.color) for text in texts]
        return lines, complete

    def largest_size(
        self, text: str, width: float, sizes: Sequence[float], weight: str = "normal"
    ) -> float:
        """The first of `sizes` (descending) at which `text` is one line of `width` inches."""
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

"""A picture on which things are placed in inches from the upper left corner, written as a PNG.

Matplotlib's object interface on the Agg canvas: no pyplot, no display, no global state.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from vlp_jax.observe.palette import INK, PALE
from vlp_jax.observe.text_layout import LINE_SPACING, Colored, TextFitter, font_families

DPI = 200
GAP, TOP = 0.12, 0.62  # inches: between pictures and at the edges; room of the two titles
FONT = 7.0  # points of a caption

Image = UInt8[np.ndarray, "height width 3"]


class Sheet:
    """A white figure with a title and a subtitle.

    Attributes:
      width, height: inches.
      figure: the matplotlib figure.
      fitter: measures text on it.
    """

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
        """Writes the PNG and makes its folder.

        Returns:
          the number of different characters that no installed font has; they are drawn as boxes.
        """
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
      side: inches of a picture.
      text_height: inches of a caption, at most.
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

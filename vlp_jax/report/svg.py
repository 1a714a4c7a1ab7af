"""SVG drawings in the colors of the page they stand in."""

from __future__ import annotations

import xml.etree.ElementTree as ET

from markupsafe import Markup

FONT = 12  # size of text, in units of the drawing
_LETTER = 0.56  # width of an average letter, by its size


class Drawing:
    """Elements on a plane of `width` by `height` units, y going down.

    Colors are given as classes of the page's style sheet ("f-ink" fills, "s-line" strokes), so that
    a drawing is light or dark as the page is, and needs no style of its own.

    Args:
      label: what it shows, for those who do not see it.
      natural: a unit is a pixel; else the drawing is as wide as the room it is given.
    """

    def __init__(self, width: float, height: float, label: str, natural: bool = False) -> None:
        self.width, self.height = width, height
        self._root = ET.Element(
            "svg",
            {"viewBox": f"0 0 {_number(width)} {_number(height)}", "role": "img"}
            | {"aria-label": label}
            | ({"width": _number(width), "height": _number(height)} if natural else {}),
        )

    def add(self, tag: str, text: str = "", title: str = "", **attributes: str | float) -> None:
        """An element; `title` is what a pointer over it shows; `_` in names is `-`, `cls` class."""
        given = {
            {"cls": "class"}.get(name, name.replace("_", "-")): (
                value if isinstance(value, str) else _number(value)
            )
            for name, value in attributes.items()
        }
        element = ET.SubElement(self._root, tag, given)
        if title:
            ET.SubElement(element, "title").text = title
        if text:
            element.text = text

    def line(self, x1: float, y1: float, x2: float, y2: float, cls: str) -> None:
        """A straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, cls=cls)

    def text(
        self, x: float, y: float, text: str, anchor: str = "start", cls: str = "f-pale", **more: str
    ) -> None:
        """Text on the base line y."""
        self.add("text", text, x=x, y=y, text_anchor=anchor, cls=cls, **more)

    def markup(self) -> Markup:
        """The drawing, to be put into a page; all text in it is escaped."""
        return Markup(ET.tostring(self._root, encoding="unicode"))


def text_width(text: str, size: float = FONT) -> float:
    """About how wide a text is, in units of the drawing."""
    return len(text) * size * _LETTER


def _number(value: float) -> str:
    return f"{round(float(value), 2):g}"

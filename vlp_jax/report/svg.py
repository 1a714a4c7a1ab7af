"""Matplotlib figures as SVG inside a page, in the page's colors and without style of their own."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET

import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure

from vlp_jax.observe.charts import SEPARATOR, TELLS
from vlp_jax.observe.palette import LIGHT

_LEFT_OUT = ("font-family", "stroke-linecap")  # the page says which font
_NUMBER = re.compile(r"(\d+\.\d{2})\d+")  # hundredths of a pixel are enough
_NAMES = {color: name for name, color in LIGHT.items()}


def figure_svg(figure: Figure, label: str, natural: bool = False) -> Markup:
    """Turns a figure into SVG; all text in it is escaped.

    A page's policy forbids style in elements, and a page is light or dark. So each color of the
    light palette becomes a class of the style sheet ("f-ink" fills, "s-line" strokes).

    Args:
      label: what the figure shows, for those who do not see it.
      natural: a unit is a pixel; else the drawing is as wide as the room it is given.
    """
    # Text stays text. Names of shared shapes are made from the label, so that figures of one page
    # do not use each other's, and the page is the same each time.
    settings = {"svg.fonttype": "none", "svg.hashsalt": label}
    buffer = io.BytesIO()
    with matplotlib.rc_context(settings):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    source = ET.fromstring(buffer.getvalue())
    box = source.get("viewBox", "")
    root = ET.Element("svg", {"viewBox": box, "role": "img", "aria-label": label})
    if natural:
        root.set("width", box.split()[2])
        root.set("height", box.split()[3])
    for child in source:
        _copy(child, root)
    return Markup(ET.tostring(root, encoding="unicode"))


def _copy(element: ET.Element, parent: ET.Element) -> None:
    """Appends an element to `parent`; one that says nothing is replaced by its children."""
    tag = element.tag.rpartition("}")[2]
    if tag in ("metadata", "style"):
        return
    told, attributes = "", {}
    for name, value in element.items():
        name = name.rpartition("}")[2]
        if name == "style":
            attributes |= _presentation(value)
        elif name == "id" and tag == "g":
            told = value.removeprefix(TELLS) if value.startswith(TELLS) else ""
        # Matplotlib rotates each upright text by -0 degrees.
        elif not value.startswith("rotate(-0 "):
            attributes[name] = _NUMBER.sub(r"\1", " ".join(value.split()))
    # Most groups say nothing. Without them and their style a chart is half as large.
    own, before = parent, len(parent)
    if tag != "g" or attributes:
        own, before = ET.SubElement(parent, tag, attributes), 0
        own.text = (element.text or "").strip() or None
    for child in element:
        _copy(child, own)
    if told:
        _tell(list(own)[before:], told.split(SEPARATOR))


def _tell(shapes: list[ET.Element], texts: list[str]) -> None:
    """Gives a text to each marker of a curve, or the only text to a shape."""
    markers = [use for shape in shapes for use in shape.iter("use")]
    for shape, text in zip(markers or shapes, texts):
        title = ET.Element("title")
        title.text = text
        shape.insert(0, title)


def _presentation(style: str) -> dict[str, str]:
    """Turns "fill: #1b1f24; font: 12px 'DejaVu Sans'" into attributes of SVG and classes."""
    found: dict[str, str] = {}
    classes = []
    for declaration in filter(None, style.split("; ")):
        name, _, value = declaration.partition(": ")
        if name in ("fill", "stroke") and value in _NAMES:
            classes.append(f"{name[0]}-{_NAMES[value].removeprefix('series-')}")
        elif name not in _LEFT_OUT:
            found[name] = value.rstrip(";")
    return found | ({"class": " ".join(classes)} if classes else {})

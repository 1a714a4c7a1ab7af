"""The charts of a page, as SVG in the page's colors."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from jaxtyping import Float, Int
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from vlp_jax.observe import charts
from vlp_jax.observe.charts import SEPARATOR, TELLS, Series
from vlp_jax.observe.palette import ACCENT, BAD, GROUND, INK, LIGHT, LINE, PALE, SERIES
from vlp_jax.observe.sheet import TextFitter
from vlp_jax.report import wording

_LEFT_OUT = ("font-family", "stroke-linecap")  # the page says which font
_NUMBER = re.compile(r"(\d+\.\d{2})\d+")  # hundredths of a pixel are enough
_NAMES = {color: name for name, color in LIGHT.items()}


def figure_svg(figure: Figure, label: str, natural: bool = False) -> Markup:
    """Turns a figure into SVG; all text in it is escaped.

    A page's policy forbids style in elements, and a page is light or dark. So each color of the
    light palette becomes a class of the style sheet ("f-ink" fills, "s-line" strokes). `label` says
    what is seen. If `natural`, a unit is a pixel; else the drawing is as wide as its room.
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


WIDTH, HEIGHT = 380.0, 220.0  # units of a drawing; on a wide screen about a pixel each
FONT = 12.0
_LEFT, _TOP, _BOTTOM = 46.0, 12.0, 38.0
_NAME_STEP = 13.0  # between names of curves
_ROW = 24.0  # of a bar
_CELL, _TINY = 13.0, 10.0  # of a confusion matrix, and its text


def line_chart(
    curves: Sequence[Series], label: str, share: bool = False, log: bool = False
) -> Markup | None:
    """Draws curves with their names at their ends; returns None if no curve has a value.

    Names, dashes and places tell curves apart, not their colors alone. `label` says what the curves
    are, for those who do not see them; a `share` is in [0, 1] and written in percent; `log` draws
    by logarithm if values span much.
    """
    points = [charts.thinned(curve.steps, curve.values) for curve in curves]
    shown = [(n, curve, *p) for n, (curve, p) in enumerate(zip(curves, points)) if len(p[0])]
    if not shown:
        return None

    def tell(value: float) -> str:
        return wording.percent(value) if share else wording.plain(value)

    last = max(x[-1] for _, _, x, _ in shown)
    figure = Figure((WIDTH / 72, HEIGHT / 72), dpi=72)
    names = [(curve.name, x[-1] / last if last else 1) for _, curve, x, _ in shown]
    axes = _axes(figure, _LEFT, _TOP, _room_for_names(figure, names), HEIGHT - _TOP - _BOTTOM)
    for number, curve, x, y in shown:
        line = charts.plot(axes, number, curve, width=2)
        if len(x) <= charts.FEW_POINTS:
            texts = (f"{curve.name} step {a:,.0f}: {tell(b)}".strip() for a, b in zip(x, y))
            charts.tell(line, *texts)
    levels = [curve.level for _, curve, _, _ in shown if curve.level is not None]
    charts.scale(axes, [*np.concatenate([y for *_, y in shown]), *levels], share, log)
    charts.steps_axis(axes, last)
    _name_ends(axes, [(n, curve.name, x[-1], y[-1]) for n, curve, x, y in shown if curve.name])
    ends = "; ".join(
        f"{curve.name or 'value'} from {tell(y[0])} to {tell(y[-1])}" for _, curve, _, y in shown
    )
    return figure_svg(figure, f"{label}: {ends}")


def bars(values: Mapping[str, float], texts: Mapping[str, str], label: str) -> Markup:
    """Draws horizontal bars, numbers >= 0, with names before and their `texts` after them."""
    height = _ROW * len(values)
    figure = Figure((WIDTH / 72, height / 72), dpi=72)
    left, right = _widest(figure, values) + 8, _widest(figure, texts.values()) + 8
    axes = _axes(figure, left, 0, WIDTH - left - right, height)
    charts.bars(axes, values, [texts[name] for name in values], FONT)
    return figure_svg(figure, label)


def histogram(
    values: Sequence[float], label: str, xlabel: str, mark: tuple[float, str] | None = None
) -> Markup:
    """Draws how often whole numbers occur; `mark` is (value, name) of a line across it."""
    figure = Figure((WIDTH / 72, 200 / 72), dpi=72)
    axes = _axes(figure, _LEFT, 22, WIDTH - _LEFT - 12, 200 - 22 - _BOTTOM)
    charts.histogram(axes, values, xlabel, mark=mark, font=FONT)
    return figure_svg(figure, label)


def reliability(
    counts: Int[np.ndarray, " bins"],
    confidence: Float[np.ndarray, " bins"],
    accuracy: Float[np.ndarray, " bins"],
    label: str,
) -> Markup:
    """Draws the share of right answers in bins of confidence; a diagonal is calibrated."""
    size = 300.0
    figure = Figure((size / 72, size / 72), dpi=72)
    axes = _axes(figure, _LEFT, _TOP, size - _LEFT - 12, size - _TOP - _BOTTOM)
    filled = np.flatnonzero(counts)
    places = (filled + 0.5) / len(counts)
    for number, bar in zip(filled, axes.bar(places, accuracy[filled], 0.9 / len(counts))):
        bar.set_color(ACCENT)
        about = f"{counts[number]:,} images with confidence about "
        right = f"{wording.percent(accuracy[number])} right"
        charts.tell(bar, f"{about}{wording.percent(confidence[number])}: {right}")
    # A wider line in the color of the ground lets the diagonal be seen on top of the bars.
    axes.plot([0, 1], [0, 1], color=GROUND, linewidth=4)
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1.5, linestyle=(0, (2, 4)))
    charts.scale(axes, accuracy[filled], share=True)
    axes.set_xlim(0, 1)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25", "50", "75", "100"])
    axes.set_xlabel("confidence, %")
    return figure_svg(figure, label)


def confusion_map(
    counts: Int[np.ndarray, "classes classes"],
    names: Sequence[str],
    rows: Sequence[int],
    columns: Sequence[int],
    label: str,
) -> Markup:
    """Draws a confusion matrix of the classes `rows` and `columns`: true down, predicted across.

    A cell is as dark as its share of its row is large (by the square root, so that single errors
    are seen). Right ones and errors have a color each; a pointer over a cell says what it is.
    """
    shown = [name if len(name) <= 30 else f"{name[:29]}…" for name in names]
    width, height = _CELL * len(columns), _CELL * len(rows)
    figure = Figure((1, 1), dpi=72)
    # A few long names must not push the matrix off a phone.
    margin = min(_widest(figure, (shown[n] for n in {*rows, *columns}), _TINY) + 8, 190)
    figure.set_size_inches((margin + width + 2) / 72, (margin + height + 2) / 72)
    axes = _axes(figure, margin, margin, width, height)
    axes.spines[:].set(visible=True, color=LINE)
    axes.tick_params(length=0, labelsize=_TINY, labelcolor=PALE, pad=4)
    axes.xaxis.tick_top()
    turned = {"rotation": 90, "rotation_mode": "anchor", "ha": "left", "va": "center"}
    axes.set_xticks(range(len(columns)), [shown[n] for n in columns], parse_math=False, **turned)
    axes.set_yticks(range(len(rows)), [shown[n] for n in rows], parse_math=False)
    axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False)
    for axis, count in ((axes.xaxis, len(columns)), (axes.yaxis, len(rows))):
        axis.set_ticks(np.arange(1, count) - 0.5, minor=True)
        axis.set_tick_params(which="minor", length=0)
        axis.grid(which="minor", color=LINE, linewidth=0.5)
    totals = np.maximum(counts.sum(axis=1), 1)
    for down, across in np.argwhere(counts[np.ix_(rows, columns)]):
        row, column = rows[down], columns[across]
        count, share = counts[row, column], counts[row, column] / totals[row]
        color = ACCENT if row == column else BAD
        cell = Rectangle((across - 0.46, down - 0.46), 0.92, 0.92, facecolor=color, linewidth=0)
        cell.set_alpha(0.25 + 0.75 * float(share) ** 0.5)
        told = f"{names[row]}, taken for {names[column]}: {count:,} of {totals[row]:,}"
        charts.tell(axes.add_patch(cell), told)
    return figure_svg(figure, label, natural=True)


def _axes(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Adds axes in the style of the page, placed in units from the upper left corner."""
    across, down = (72 * inches for inches in figure.get_size_inches())
    figure.patch.set_visible(False)
    box = (left / across, 1 - (top + height) / down, width / across, height / down)
    axes = figure.add_axes(box)
    charts.style(axes, FONT, grid=True)
    return axes


def _widest(figure: Figure, texts, size: float = FONT) -> float:
    fitter = TextFitter(figure)
    return 72 * max(fitter.width(text, size) for text in texts)


def _room_for_names(figure: Figure, names: Sequence[tuple[str, float]]) -> float:
    """Returns the width of the axes that leaves room for names behind the ends of curves."""
    # Measured in DejaVu Sans, which is wider than the fonts that browsers take.
    whole, fitter = WIDTH - _LEFT - 12, TextFitter(figure)
    room = [(whole - 72 * fitter.width(name, FONT, "bold")) / max(end, 0.01) for name, end in names]
    return min(whole, *(max(width, WIDTH / 4) for width in room))


def _name_ends(axes: Axes, names: Sequence[tuple[int, str, float, float]]) -> None:
    """Writes names at the ends of their curves, moved apart where they would cover each other."""
    axes.get_ylim()  # has the limits computed, which `transData` alone does not
    # From the lowest to the highest, each at least a line above the one before; then all move
    # down if the highest has left the drawing.
    ends = [axes.transData.transform((x, y)) for _, _, x, y in names]
    order = np.argsort([y for _, y in ends])
    places: list[float] = []
    for index in order:
        places.append(max(ends[index][1], places[-1] + _NAME_STEP if places else 0.0))
    beyond = max(0.0, places[-1] - (HEIGHT - _TOP)) if places else 0.0
    for index, place in zip(order, places):
        number, name, *_ = names[index]
        axes.annotate(
            name,
            (ends[index][0] + 6, place - beyond),
            xycoords="figure pixels",
            fontsize=FONT,
            weight="bold",
            color=SERIES[number % len(SERIES)],
            va="center",
            parse_math=False,
        )

"""Figures of a run as PNG files: the report of a contrastive model, and curves of any run.

Matplotlib's object interface on the Agg canvas: no pyplot, no display, no global state.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from vlp_jax.observe.text_layout import LINE_SPACING, Colored, TextFitter

# Okabe and Ito, "Color universal design" (2008): told apart with any kind of color vision.
CORRECT, WRONG = "#0072B2", "#D55E00"
CURVE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
INK, PALE = "#222222", "#666666"
_DPI = 200
_REPORT_INCHES = (8.0, 5.0)

# Fractions of the report's width and height.
_GALLERY = (0.02, 0.035, 0.605, 0.845)  # left, bottom, right, top
_HEADINGS_Y = 0.862
_GALLERY_GRIDS = ((3, 4), (2, 4), (2, 5))  # (rows, columns), preferred first
_CAPTION_SIZES = tuple(size / 4 for size in range(34, 17, -1))  # 8.5 down to 4.5 points
_CHANCE_GAP = 0.08  # of the height of a panel: what a word takes up
_EASY_CAPTION_SIZE = 6.5  # below this, fewer images are better than smaller text

Curve = tuple[Sequence[float], Sequence[float]]


def draw_report(
    path: epath.PathLike,
    *,
    title: str,
    subtitle: str,
    images: UInt8[np.ndarray, "images height width 3"],
    true_captions: Sequence[str],
    retrieved_captions: Sequence[str],
    correct: Bool[np.ndarray, " images"] | Sequence[bool],
    similarity: Float[np.ndarray, "captioned captions"],
    curves: Mapping[str, Curve],
    chance: Mapping[str, float],
) -> None:
    """Writes a 1600 x 1000 PNG that shows what a contrastive model has learnt.

    (a) held-out images, each with the caption that the model ranks first, and the true one where
    that differs; (b) similarity of images (rows) and captions (columns), with matching pairs on
    the diagonal; (c) loss and accuracies over the steps.

    Args:
        path: the PNG; its directory is made.
        title, subtitle: what was trained, and on what, in a line each.
        images: the first 12 are shown; fewer (10 or 8) where captions are long. Give at least 8.
        true_captions, retrieved_captions: one an image; long ones are set smaller.
        correct: whether the retrieved caption counts as right.
        similarity: cosine similarities, or logits.
        curves: name -> (steps, values). Names with "loss" share one panel, all others, fractions
            in [0, 1], the other.
        chance: name of a curve -> its value for a random model, drawn as a dotted line.

    Raises:
        ValueError: lengths or shapes do not match, or a chance line has no curve.
    """
    figure = report_figure(
        title=title,
        subtitle=subtitle,
        images=images,
        true_captions=true_captions,
        retrieved_captions=retrieved_captions,
        correct=correct,
        similarity=similarity,
        curves=curves,
        chance=chance,
    )
    save_figure(figure, path)


def report_figure(
    *,
    title: str,
    subtitle: str,
    images: UInt8[np.ndarray, "images height width 3"],
    true_captions: Sequence[str],
    retrieved_captions: Sequence[str],
    correct: Bool[np.ndarray, " images"] | Sequence[bool],
    similarity: Float[np.ndarray, "captioned captions"],
    curves: Mapping[str, Curve],
    chance: Mapping[str, float],
) -> Figure:
    """The figure that `draw_report` writes; arguments are the same."""
    if not len(images) == len(true_captions) == len(retrieved_captions) == len(correct):
        raise ValueError("images, true_captions, retrieved_captions and correct differ in length")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (n, h, w, 3), not {images.dtype} {images.shape}")
    if unknown := set(chance) - set(curves):
        raise ValueError(f"chance lines without a curve: {sorted(unknown)}")
    figure = new_figure(_REPORT_INCHES)
    fitter = TextFitter(figure)
    _draw_titles(figure, fitter, title, subtitle)
    captions = [
        _caption_paragraphs(*args)
        for args in zip(true_captions, retrieved_captions, correct, strict=True)
    ]
    _draw_gallery(figure, fitter, images, captions, correct)
    _draw_similarity(figure, similarity)
    losses = {name: curve for name, curve in curves.items() if "loss" in name.lower()}
    accuracies = {name: curve for name, curve in curves.items() if name not in losses}
    if any(not 0 <= value <= 1 for _, values in accuracies.values() for value in values):
        raise ValueError("curves without 'loss' in their names must be fractions in [0, 1]")
    _heading(figure, 0.655, 0.415, "c", "training")
    height = 0.315 - 0.025 * max(len(losses), len(accuracies))  # room for the legends above
    for left, panel, fractions in ((0.665, losses, False), (0.845, accuracies, True)):
        axes = figure.add_axes((left, 0.085, 0.14, height))
        _draw_panel(axes, panel, {k: v for k, v in chance.items() if k in panel})
        if fractions:
            axes.set_ylim(0, 1.03)
            axes.set_yticks(np.linspace(0, 1, 5))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("step", fontsize=6.5, color=INK, labelpad=1.5)
    return figure


def draw_curves(
    path: epath.PathLike,
    records: Sequence[Mapping[str, Any]],
    *,
    title: str,
    names: Sequence[str] | None = None,
) -> None:
    """Writes a PNG with the curves of a run, from `read_metrics` of its metrics.jsonl.

    Metrics that differ in what is before their last slash alone ("train/loss", "val/loss") share a
    panel. Values that are NaN or infinite leave a gap.

    Args:
        path: the PNG; its directory is made.
        records: as `read_metrics` returns them.
        title: the heading.
        names: the metrics to draw; None is all that have at least two finite values.

    Raises:
        ValueError: nothing to draw, or a name that no record has.
    """
    curves = _curves_of(records)
    if names is None:
        names = [name for name, (_, values) in curves.items() if np.isfinite(values).sum() >= 2]
    if unknown := set(names) - set(curves):
        raise ValueError(f"no such metrics: {sorted(unknown)} (known: {sorted(curves)})")
    if not names:
        raise ValueError("no metric has two finite values, so there is no curve to draw")
    panels: dict[str, dict[str, Curve]] = {}
    for name in names:
        group, _, metric = name.rpartition("/")
        panels.setdefault(metric, {})[group or "run"] = curves[name]
    save_figure(_curves_figure(panels, title), path)


def _curves_figure(panels: Mapping[str, Mapping[str, Curve]], title: str) -> Figure:
    """Small multiples, four in a row; lengths are in inches."""
    columns = min(len(panels), 4)
    rows = math.ceil(len(panels) / columns)
    width, height, top = 2.2 * max(columns, 2), 0.45 + 1.85 * rows, 0.45
    figure = new_figure((width, height))
    sizes = (11, 10, 9, 8, 7, 6)
    size = TextFitter(figure).largest_size(title, width - 0.3, sizes, "bold")
    x, y = 0.15 / width, 1 - 0.3 / height
    figure.text(x, y, title, fontsize=size, weight="bold", color=INK, parse_math=False)
    cell = width / columns
    for index, (metric, panel) in enumerate(panels.items()):
        row, column = divmod(index, columns)
        bottom = height - top - (row + 1) * 1.85 + 0.38
        size = max(1.3 - 0.12 * (len(panel) + 1), 0.5)  # the legend is above
        box = ((column * cell + 0.48) / width, bottom / height, (cell - 0.6) / width, size / height)
        axes = figure.add_axes(box)
        _draw_panel(axes, panel, {}, heading=metric)
        axes.set_xlabel("step", fontsize=6.5, color=INK, labelpad=1.5)
    return figure


def _curves_of(records: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Metric -> (steps, values), in the order of first appearance."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                points.setdefault(name, []).append((record["step"], float(value)))
    return {
        name: ([step for step, _ in pairs], [value for _, value in pairs])
        for name, pairs in points.items()
    }


def _caption_paragraphs(true: str, retrieved: str, correct: bool) -> list[Colored]:
    if correct:
        return [Colored(f"✓ {retrieved}", CORRECT)]
    return [Colored(f"✗ {retrieved}", WRONG), Colored(f"true: {true}", PALE)]


def _draw_titles(figure: Figure, fitter: TextFitter, title: str, subtitle: str) -> None:
    width = _REPORT_INCHES[0] * 0.96
    size = fitter.largest_size(title, width, (13, 12, 11, 10, 9, 8, 7), "bold")
    figure.text(0.02, 0.945, title, fontsize=size, weight="bold", color=INK, parse_math=False)
    size = fitter.largest_size(subtitle, width, (8, 7.5, 7, 6.5, 6, 5.5, 5))
    figure.text(0.02, 0.908, subtitle, fontsize=size, color=PALE, parse_math=False)


def _heading(figure: Figure, x: float, y: float, letter: str, text: str) -> None:
    figure.text(x, y, letter, fontsize=8.5, weight="bold", color=INK)
    figure.text(x + 0.015, y, text, fontsize=7.5, color=INK, parse_math=False)


def _draw_gallery(
    figure: Figure,
    fitter: TextFitter,
    images: np.ndarray,
    captions: Sequence[Sequence[Colored]],
    correct: Sequence[bool] | np.ndarray,
) -> None:
    _heading(figure, 0.02, _HEADINGS_Y, "a", "held-out images and the caption ranked first")
    rows, columns, size = _choose_grid(fitter, captions)
    width, side, text_height = _cell_inches(rows, columns)
    left, _, right, top = _GALLERY
    pitch_x = (right - left) / columns
    pitch_y = (_GALLERY[3] - _GALLERY[1]) / rows
    figure_width, figure_height = _REPORT_INCHES
    for index in range(min(len(images), rows * columns)):
        row, column = divmod(index, columns)
        x, y = left + column * pitch_x, top - row * pitch_y
        axes = figure.add_axes(
            (x, y - side / figure_height, side / figure_width, side / figure_height)
        )
        axes.imshow(images[index], interpolation="antialiased")
        axes.set_xticks([])
        axes.set_yticks([])
        for spine in axes.spines.values():
            spine.set(color=CORRECT if correct[index] else WRONG, linewidth=1.6)
        lines, _ = fitter.lay_out(captions[index], size, width, text_height)
        _draw_lines(figure, lines, x, y - (side + 0.05) / figure_height, size)


def _draw_lines(figure: Figure, lines: Sequence[Colored], x: float, y: float, size: float) -> None:
    step = size * LINE_SPACING / 72 / _REPORT_INCHES[1]
    for number, line in enumerate(lines):
        figure.text(
            x,
            y - (number + 0.8) * step,
            line.text,
            fontsize=size,
            color=line.color,
            va="baseline",
            parse_math=False,
        )


def _choose_grid(
    fitter: TextFitter, captions: Sequence[Sequence[Colored]]
) -> tuple[int, int, float]:
    """Rows, columns and font size: the first grid that is full and easy to read, else the best."""
    grids = [grid for grid in _GALLERY_GRIDS if math.prod(grid) <= max(len(captions), 8)]
    sizes = [_fitting_size(fitter, captions[: math.prod(grid)], *grid) for grid in grids]
    for grid, size in zip(grids, sizes, strict=True):
        if size >= _EASY_CAPTION_SIZE:
            return *grid, size
    best = int(np.argmax(sizes))
    return *grids[best], max(sizes[best], _CAPTION_SIZES[-1])


def _fitting_size(
    fitter: TextFitter, captions: Sequence[Sequence[Colored]], rows: int, columns: int
) -> float:
    """The largest caption size at which all fit their cells; 0 if none does."""
    width, _, height = _cell_inches(rows, columns)
    for size in _CAPTION_SIZES:
        if all(fitter.lay_out(caption, size, width, height)[1] for caption in captions):
            return size
    return 0.0


def _cell_inches(rows: int, columns: int) -> tuple[float, float, float]:
    """Width of a caption, side of an image, height of a caption."""
    left, bottom, right, top = _GALLERY
    width = (right - left) * _REPORT_INCHES[0] / columns - 0.11
    height = (top - bottom) * _REPORT_INCHES[1] / rows
    side = min(width, 0.66 * height)
    return width, side, height - side - 0.13


def _draw_similarity(figure: Figure, similarity: np.ndarray) -> None:
    rows, columns = similarity.shape
    _heading(figure, 0.655, _HEADINGS_Y, "b", "similarity of images and captions")
    axes = figure.add_axes((0.685, 0.495, 0.216, 0.35))
    drawn = axes.imshow(similarity, cmap="viridis", interpolation="nearest", aspect="auto")
    axes.set_xlabel(f"caption (1 to {columns})", fontsize=6.5, color=INK, labelpad=2)
    axes.set_ylabel(f"image (1 to {rows})", fontsize=6.5, color=INK, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    bar = figure.colorbar(drawn, cax=figure.add_axes((0.912, 0.495, 0.011, 0.35)))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=2, width=0.5, color=PALE, labelcolor=INK)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))


def _draw_chance(axes: Axes, values: Sequence[float]) -> None:
    """A dotted line for each of the ascending `values`; lines too close for two words share one."""
    low, high = axes.get_ylim()
    for value, above in itertools.pairwise([*values, math.inf]):
        axes.axhline(value, color=PALE, linewidth=0.9, linestyle=":")
        if above - value > _CHANCE_GAP * (high - low):
            axes.annotate(
                "chance",
                (1.0, value),
                (-1, 1.5),
                xycoords=("axes fraction", "data"),
                textcoords="offset points",
                ha="right",
                fontsize=5.5,
                color=PALE,
            )


def _draw_panel(
    axes: Axes, curves: Mapping[str, Curve], chance: Mapping[str, float], heading: str = ""
) -> None:
    """Curves with a legend above the axes, where it can hide nothing."""
    axes.margins(x=0.02, y=0.12)
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = CURVE_COLORS[index % len(CURVE_COLORS)]
        steps, values = np.asarray(steps, float), np.asarray(values, float)
        values = np.where(np.isfinite(values), values, np.nan)
        smooth = _running_mean(values)
        if smooth is not values:
            axes.plot(steps, values, color=color, linewidth=0.5, alpha=0.3)
        marker = "o" if len(steps) <= 20 else None
        label = name.replace("_", " ")
        axes.plot(steps, smooth, color=color, linewidth=1.3, marker=marker, ms=2, label=label)
    _draw_chance(axes, sorted(set(chance.values())))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set(color=PALE, linewidth=0.6)
    axes.tick_params(labelsize=6, length=2, width=0.5, color=PALE, labelcolor=INK, pad=1.5)
    axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))
    if curves:
        axes.legend(
            title=heading.replace("_", " ") or None,
            title_fontproperties={"size": 7, "weight": "bold"},
            alignment="left",
            loc="lower left",
            bbox_to_anchor=(-0.04, 1.0),
            frameon=False,
            fontsize=6.2,
            labelcolor="linecolor",
            handlelength=0.9,
            handletextpad=0.4,
            labelspacing=0.25,
            borderpad=0.1,
            borderaxespad=0.2,
        )


def _running_mean(values: np.ndarray) -> np.ndarray:
    """A centred mean over a fiftieth of the curve; `values` itself where that is hardly a point."""
    half = len(values) // 100
    if half < 2:
        return values
    return np.array(
        [
            np.nanmean(window) if np.isfinite(window).any() else np.nan
            for window in (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
        ]
    )


def new_figure(inches: tuple[float, float]) -> Figure:
    """An empty white figure of so many inches across and down."""
    figure = Figure(figsize=inches, dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: epath.PathLike) -> None:
    """Writes the figure as a PNG; its directory is made."""
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    path.write_bytes(buffer.getvalue())

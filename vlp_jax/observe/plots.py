"""The picture of a contrastive model after training: examples, similarities and curves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from vlp_jax.observe import charts
from vlp_jax.observe.charts import Series
from vlp_jax.observe.palette import ACCENT, BAD, INK, PALE
from vlp_jax.observe.sheet import Colored, Sheet, TextFitter

CORRECT, WRONG = ACCENT, BAD
_WIDTH, _HEIGHT = 8.0, 5.0  # inches
_GALLERY_LEFT, _GALLERY_TOP, _GALLERY_WIDTH, _GALLERY_HEIGHT = 0.16, 0.775, 4.68, 4.05
_HEADINGS = 0.69  # inches from the top
_GRIDS = ((3, 4), (2, 4), (2, 5))  # (rows, columns) of the gallery, preferred first
_CAPTION_SIZES = tuple(size / 4 for size in range(34, 17, -1))  # 8.5 down to 4.5 points
_EASY_CAPTION_SIZE = 6.5  # below this, fewer images are better than smaller text
_CHANCE_GAP = 0.08  # of the height of a panel: room of a word

Curve = tuple[Sequence[float], Sequence[float]]


def report_sheet(
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
) -> Sheet:
    """Draws what a contrastive model has learnt; saved, it is a PNG of 1600 x 1000 pixels.

    (a) held-out images, each with the caption that the model ranks first, and the true one where
    that differs; (b) similarity of images (rows) and captions (columns), with matching pairs on
    the diagonal; (c) loss and accuracies over the steps.

    Args:
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
    if not len(images) == len(true_captions) == len(retrieved_captions) == len(correct):
        raise ValueError("images, true_captions, retrieved_captions and correct differ in length")
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"images must be uint8 (n, h, w, 3), not {images.dtype} {images.shape}")
    if unknown := set(chance) - set(curves):
        raise ValueError(f"chance lines without a curve: {sorted(unknown)}")
    losses = {name: curve for name, curve in curves.items() if "loss" in name.lower()}
    accuracies = {name: curve for name, curve in curves.items() if name not in losses}
    if any(not 0 <= value <= 1 for _, values in accuracies.values() for value in values):
        raise ValueError("curves without 'loss' in their names must be fractions in [0, 1]")
    sheet = Sheet(_WIDTH, _HEIGHT, title, subtitle)
    captions = [
        _paragraphs(*args) for args in zip(true_captions, retrieved_captions, correct, strict=True)
    ]
    _draw_gallery(sheet, images, captions, correct)
    _draw_similarity(sheet, similarity)
    _heading(sheet, 5.24, 2.925, "c", "training")
    height = 1.575 - 0.125 * max(len(losses), len(accuracies))  # room for the legends above
    for left, panel, share in ((5.32, losses, False), (6.76, accuracies, True)):
        axes = sheet.axes(left, 4.575 - height, 1.12, height)
        _draw_panel(axes, panel, sorted({chance[name] for name in panel if name in chance}), share)
    return sheet


def _paragraphs(true: str, retrieved: str, correct: bool) -> list[Colored]:
    if correct:
        return [Colored(f"✓ {retrieved}", CORRECT)]
    return [Colored(f"✗ {retrieved}", WRONG), Colored(f"true: {true}", PALE)]


def _heading(sheet: Sheet, x: float, y: float, letter: str, text: str) -> None:
    sheet.text(x, y, letter, 8.5, weight="bold")
    sheet.text(x + 0.12, y, text, 7.5)


def _draw_gallery(
    sheet: Sheet,
    images: np.ndarray,
    captions: Sequence[Sequence[Colored]],
    correct: Sequence[bool] | np.ndarray,
) -> None:
    left, top = _GALLERY_LEFT, _GALLERY_TOP
    _heading(sheet, left, _HEADINGS, "a", "held-out images and the caption ranked first")
    rows, columns, size = _choose_grid(sheet.fitter, captions)
    width, side, text_height = _cell(rows, columns)
    for index in range(min(len(images), rows * columns)):
        row, column = divmod(index, columns)
        x, y = left + column * _GALLERY_WIDTH / columns, top + row * _GALLERY_HEIGHT / rows
        sheet.picture(images[index], x, y, side, CORRECT if correct[index] else WRONG, 1.6)
        lines, _ = sheet.fitter.lay_out(captions[index], size, width, text_height)
        sheet.lines(x, y + side + 0.05, lines, size)


def _choose_grid(
    fitter: TextFitter, captions: Sequence[Sequence[Colored]]
) -> tuple[int, int, float]:
    """Returns rows, columns and font size: the first grid that is easy to read, or the best."""
    grids = [grid for grid in _GRIDS if math.prod(grid) <= max(len(captions), 8)]
    sizes = [_fitting_size(fitter, captions[: math.prod(grid)], *grid) for grid in grids]
    for grid, size in zip(grids, sizes, strict=True):
        if size >= _EASY_CAPTION_SIZE:
            return *grid, size
    best = int(np.argmax(sizes))
    return *grids[best], max(sizes[best], _CAPTION_SIZES[-1])


def _fitting_size(
    fitter: TextFitter, captions: Sequence[Sequence[Colored]], rows: int, columns: int
) -> float:
    """Returns the largest caption size at which all fit their cells; 0 if none does."""
    width, _, height = _cell(rows, columns)
    for size in _CAPTION_SIZES:
        if all(fitter.lay_out(caption, size, width, height)[1] for caption in captions):
            return size
    return 0.0


def _cell(rows: int, columns: int) -> tuple[float, float, float]:
    """Returns the width of a caption, the side of an image and the height of a caption."""
    width, height = _GALLERY_WIDTH / columns - 0.11, _GALLERY_HEIGHT / rows
    side = min(width, 0.66 * height)
    return width, side, height - side - 0.13


def _draw_similarity(sheet: Sheet, similarity: np.ndarray) -> None:
    rows, columns = similarity.shape
    _heading(sheet, 5.24, _HEADINGS, "b", "similarity of images and captions")
    axes = sheet.axes(5.48, 0.775, 1.728, 1.75)
    drawn = axes.imshow(similarity, cmap="viridis", interpolation="nearest", aspect="auto")
    axes.set_xlabel(f"caption (1 to {columns})", fontsize=6.5, color=INK, labelpad=2)
    axes.set_ylabel(f"image (1 to {rows})", fontsize=6.5, color=INK, labelpad=2)
    axes.set_xticks([])
    axes.set_yticks([])
    bar = sheet.figure.colorbar(drawn, cax=sheet.axes(7.296, 0.775, 0.088, 1.75))
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=2, width=0.5, color=PALE, labelcolor=INK)
    bar.ax.yaxis.set_major_locator(MaxNLocator(5))


def _draw_panel(
    axes: Axes, curves: Mapping[str, Curve], chance: Sequence[float], share: bool
) -> None:
    """Draws curves with a legend above the axes, where it can hide nothing."""
    charts.style(axes, 6)
    curves = {name: curve for name, curve in curves.items() if len(curve[0])}
    values = [value for _, each in curves.values() for value in each]
    for number, (name, (steps, each)) in enumerate(curves.items()):
        smooth = _running_mean(np.asarray(each, float))
        if smooth is not None:
            axes.plot(steps, each, linewidth=0.5, alpha=0.3, color=charts.look(number)["color"])
        shown = each if smooth is None else smooth
        charts.plot(axes, number, Series(name.replace("_", " "), steps, shown))
    if not curves:
        return
    charts.scale(axes, [*values, *chance], share)
    charts.steps_axis(axes, max(steps[-1] for steps, _ in curves.values()))
    charts.legend(axes, 6.2)
    low, high = axes.get_ylim()
    for value, above in itertools.pairwise([*chance, math.inf]):
        axes.axhline(value, color=PALE, linewidth=0.9, linestyle=":")
        if above - value > _CHANCE_GAP * (high - low):  # lines closer than a word share one
            place = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
            look = {"fontsize": 5.5, "color": PALE, "ha": "right"}
            axes.annotate("chance", (1, value), (-1, 1.5), **place, **look)


def _running_mean(values: np.ndarray) -> np.ndarray | None:
    """Returns a centred mean over a fiftieth of the curve; None where that is hardly a point."""
    half = len(values) // 100
    if half < 2:
        return None
    values = np.where(np.isfinite(values), values, np.nan)
    windows = (values[max(i - half, 0) : i + half + 1] for i in range(len(values)))
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])

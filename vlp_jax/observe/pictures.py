"""Pictures of what a masked autoencoder paints, and of several runs side by side, as PNG files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from vlp_jax.observe.plots import CURVE_COLORS, INK, PALE, Curve, new_figure, save_figure

VIEWS = ("seen", "painted", "true")
_ACROSS = 4  # images side by side
_CELL, _GAP, _TOP = 0.72, 0.12, 0.66  # inches: a view, between images, titles


def draw_reconstructions(
    path: epath.PathLike,
    views: Float[np.ndarray, "images 3 height width 3"],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG that shows, for each image, what is seen, what is painted, and the truth.

    Args:
      path: the PNG; its directory is made.
      views: values in [0, 1], as `MaskedAutoencoding.reconstruct` gives them.
      title, subtitle: what painted, and what on, in a line each.

    Raises:
      ValueError: there are not three views of each image, or no image.
    """
    if views.ndim != 5 or views.shape[1] != len(VIEWS) or not len(views):
        raise ValueError(f"three views of at least one image are drawn, not {views.shape}")
    across = min(_ACROSS, len(views))
    down = -(-len(views) // across)
    group = len(VIEWS) * _CELL + _GAP
    width, height = across * group + _GAP, down * (_CELL + _GAP) + _TOP
    figure = new_figure((width, height))
    _titles(figure, title, subtitle, _GAP / width)
    for index, image in enumerate(views):
        row, column = divmod(index, across)
        for place, view in enumerate(image):
            left = _GAP + column * group + place * _CELL
            bottom = height - _TOP - row * (_CELL + _GAP) - _CELL
            axes = figure.add_axes(
                (left / width, bottom / height, 0.97 * _CELL / width, 0.97 * _CELL / height)
            )
            axes.imshow(np.clip(view, 0, 1), interpolation="nearest")
            axes.set_axis_off()
            if row == 0:
                axes.set_title(VIEWS[place], fontsize=6.5, color=PALE, pad=2)
    save_figure(figure, path)


def draw_comparison(
    path: epath.PathLike,
    curves: Mapping[str, Curve],
    *,
    title: str,
    subtitle: str,
    ylabel: str,
    target: float | None = None,
    target_label: str = "",
) -> None:
    """Writes a PNG with one score of several runs over their steps.

    Args:
      path: the PNG; its directory is made.
      curves: name of the run -> (steps, values), values in [0, 1].
      target: a value that is marked with a dotted line; None for none.
      target_label: what stands at the line, before the value.

    Raises:
      ValueError: no curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    figure = new_figure((6.4, 4.0))
    _titles(figure, title, subtitle, 0.1)
    axes = figure.add_axes((0.1, 0.13, 0.86, 0.68))
    for look, (name, (steps, values)) in zip(_looks(), curves.items(), strict=False):
        axes.plot(steps, values, marker="o", markersize=3, linewidth=1.4, label=name, **look)
    if target is not None:
        axes.axhline(target, color=PALE, linewidth=0.9, linestyle=":")
        label = f"{target_label} {target:g}".strip()
        axes.annotate(
            label,
            (0, target),
            (4, -3),
            textcoords="offset points",
            va="top",
            fontsize=7,
            color=PALE,
        )
    axes.set_ylim(0, 1.02)
    axes.set_xlim(left=0)
    axes.set_xlabel("steps", fontsize=8)
    axes.set_ylabel(ylabel, fontsize=8)
    axes.tick_params(labelsize=7.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    save_figure(figure, path)


def draw_differences(
    path: epath.PathLike,
    curves: Mapping[str, Sequence[Curve]],
    *,
    baseline: str,
    title: str,
    subtitle: str,
    ylabel: str,
) -> None:
    """Writes a PNG with a curve of several variants, and beside it how they differ from one.

    A variant that was logged at other steps than that one has no curve of differences.

    Args:
      path: the PNG; its directory is made.
      curves: variant -> (steps, values) of each of its runs; runs at the same place in the lists
        belong together, and all of a variant have the same steps.
      baseline: the variant that the others are held against.
      ylabel: what the values are.

    Raises:
      ValueError: the variants have different numbers of runs, or a variant's were logged at
        different steps.
    """
    logged = {name: {tuple(np.asarray(run[0])) for run in runs} for name, runs in curves.items()}
    numbers = {len(runs) for runs in curves.values()}
    if len(numbers) > 1 or any(len(found) > 1 for found in logged.values()):
        raise ValueError("numbers of runs differ, or the steps at which a variant's were logged")
    steps = {name: np.asarray(*found) for name, found in logged.items()}
    values = {name: np.asarray([run[1] for run in runs]) for name, runs in curves.items()}
    figure = new_figure((8.0, 3.9))
    _titles(figure, title, subtitle, 0.075)
    left = figure.add_axes((0.075, 0.13, 0.4, 0.67))
    right = figure.add_axes((0.575, 0.13, 0.4, 0.67))
    for look, (name, of_runs) in zip(_looks(), values.items(), strict=False):
        _draw_band(left, steps[name], of_runs, look, name)
        if name != baseline and logged[name] == logged[baseline]:
            _draw_band(right, steps[name], of_runs - values[baseline], look, name)
    right.axhline(0, color=PALE, linewidth=0.9, linestyle=":")
    left.set_ylabel(ylabel, fontsize=8)
    right.set_ylabel(f"{ylabel}, minus that of {baseline}", fontsize=8)
    for axes, last in ((left, max(x[-1] for x in steps.values())), (right, steps[baseline][-1])):
        axes.set_xlim(0, last)
        axes.set_xlabel("steps", fontsize=8)
        axes.tick_params(labelsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(frameon=False, fontsize=8, loc="upper right")
    save_figure(figure, path)


def _looks() -> Iterator[dict[str, str]]:
    """Colors and line styles for any number of curves, no two of the first eighteen alike."""
    for style in itertools.cycle(("-", "--", ":")):
        for color in CURVE_COLORS:
            yield {"color": color, "linestyle": style}


def _draw_band(
    axes: Axes, steps: np.ndarray, of_runs: np.ndarray, look: Mapping[str, str], name: str
) -> None:
    """The mean over the runs [runs, steps], within the least and the most."""
    axes.plot(steps, of_runs.mean(0), linewidth=1.2, label=name, **look)
    band = of_runs.min(0), of_runs.max(0)
    axes.fill_between(steps, *band, color=look["color"], alpha=0.2, linewidth=0)


def _titles(figure: Figure, title: str, subtitle: str, left: float) -> None:
    height = figure.get_figheight()
    figure.text(left, 1 - 0.09 / height, title, fontsize=10.5, color=INK, va="top", weight="bold")
    figure.text(left, 1 - 0.29 / height, subtitle, fontsize=7.5, color=PALE, va="top")

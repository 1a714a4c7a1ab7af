"""Pictures of what a masked autoencoder paints, and of several runs side by side, as PNG files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from etils import epath
from jaxtyping import Float

from vlp_jax.observe import charts
from vlp_jax.observe.charts import Series
from vlp_jax.observe.palette import PALE
from vlp_jax.observe.plots import Curve
from vlp_jax.observe.sheet import Sheet, picture_grid
from vlp_jax.observe.text_layout import Colored

VIEWS = ("seen", "painted", "true")
_ACROSS = 4  # images side by side
_FONT = 7.5  # points


def draw_reconstructions(
    path: epath.PathLike,
    views: Float[np.ndarray, "images 3 height width 3"],
    *,
    title: str,
    subtitle: str,
) -> None:
    """Writes a PNG that shows, for each image, what is seen, what is painted, and the truth.

    Args:
      path: the PNG; its folder is made.
      views: values in [0, 1], as `MaskedAutoencoding.reconstruct` gives them.
      title, subtitle: what painted, and what on, in a line each.

    Raises:
      ValueError: there are not three views of each image, or no image.
    """
    if views.ndim != 5 or views.shape[1] != len(VIEWS) or not len(views):
        raise ValueError(f"three views of at least one image are drawn, not {views.shape}")
    panels = list(np.clip(views, 0, 1).reshape(-1, *views.shape[2:]))
    captions = [[Colored(view, PALE)] for view in VIEWS] * len(views)
    across = len(VIEWS) * _ACROSS
    picture_grid(panels, captions, title, subtitle, across=across, side=0.72)[0].save(path)


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
      path: the PNG; its folder is made.
      curves: name of the run -> (steps, values), values in [0, 1].
      ylabel: the name of the score.
      target: a value that is marked with a dotted line; None for none.
      target_label: the text at the line, before the value.

    Raises:
      ValueError: no curve.
    """
    if not curves:
        raise ValueError("there is no curve to draw")
    sheet = Sheet(6.4, 4.0, title, subtitle)
    axes = sheet.axes(0.64, 0.76, 5.5, 2.72)
    charts.style(axes, _FONT)
    for number, (name, curve) in enumerate(curves.items()):
        charts.plot(axes, number, Series(name, *curve))
    charts.scale(axes, [0.0], share=True)
    charts.steps_axis(axes, max(steps[-1] for steps, _ in curves.values()))
    axes.set_ylabel(ylabel)
    if target is not None:
        axes.axhline(target, color=PALE, linewidth=0.9, linestyle=":")
        place = {"xytext": (4, -3), "textcoords": "offset points", "va": "top"}
        label = f"{target_label} {target:g}".strip()
        axes.annotate(label, (0, target), **place, fontsize=7, color=PALE)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    sheet.save(path)


def draw_differences(
    path: epath.PathLike,
    curves: Mapping[str, Sequence[Curve]],
    *,
    baseline: str,
    title: str,
    subtitle: str,
    ylabel: str,
) -> None:
    """Writes a PNG with the curves of variants, and beside it their differences from a baseline.

    A curve is the mean over the runs of a variant, in a band from the least to the most. A variant
    that was logged at other steps than the baseline has no curve of differences.

    Args:
      path: the PNG; its folder is made.
      curves: variant -> (steps, values) of each of its runs; runs at the same place in the lists
        belong together, and all of a variant have the same steps.
      baseline: the variant that is subtracted.
      ylabel: the name of the values.

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
    sheet = Sheet(8.0, 3.9, title, subtitle)
    left, right = (sheet.axes(x, 0.78, 3.2, 2.6) for x in (0.6, 4.6))
    for axes in (left, right):
        charts.style(axes, _FONT)
    for number, (name, of_runs) in enumerate(values.items()):
        shown = [(left, of_runs)]
        if name != baseline and logged[name] == logged[baseline]:
            shown.append((right, of_runs - values[baseline]))
        for axes, each in shown:
            look = charts.look(number)
            axes.plot(steps[name], each.mean(0), linewidth=1.2, label=name, **look)
            band = each.min(0), each.max(0)
            axes.fill_between(steps[name], *band, color=look["color"], alpha=0.2, linewidth=0)
    right.axhline(0, color=PALE, linewidth=0.9, linestyle=":")
    left.set_ylabel(ylabel)
    right.set_ylabel(f"{ylabel}, minus {baseline}")
    charts.steps_axis(left, max(each[-1] for each in steps.values()))
    charts.steps_axis(right, steps[baseline][-1])
    left.legend(frameon=False, fontsize=8, loc="upper right")
    sheet.save(path)

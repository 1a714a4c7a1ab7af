"""Curves over the steps of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from markupsafe import Markup

from vlp_jax.report import wording
from vlp_jax.report.axes import Scale, fit, thinned, wants_log
from vlp_jax.report.palette import SERIES
from vlp_jax.report.svg import FONT, Drawing, text_width

WIDTH, HEIGHT = 380.0, 220.0
_LEFT, _TOP, _BOTTOM = 46.0, 12.0, 34.0
_FEW = 25  # points that are marked each
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 3", "10 4")
_BOLD = 1.1  # how much wider bold letters are
_LABEL_STEP = 13.0  # between names of curves


@dataclasses.dataclass(frozen=True)
class Series:
    """A curve.

    Attributes:
      name: what stands at its end; "" for nothing.
      steps, values: of equal length, steps ascending; values that are not finite are left out.
      level: a value that is marked beside it, dotted: chance.
    """

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    level: float | None = None


def line_chart(
    curves: Sequence[Series], label: str, share: bool = False, log: bool = False
) -> Markup | None:
    """Curves with their names at their ends; None if none has a value.

    Names, dashes and places tell curves apart, not their colors alone.

    Args:
      label: what they are, for those who do not see it.
      share: values are in [0, 1], written in percent.
      log: by logarithm if they span much.
    """
    points = [thinned(curve.steps, curve.values) for curve in curves]
    shown = [(n, curve, *p) for n, (curve, p) in enumerate(zip(curves, points)) if len(p[0])]
    if not shown:
        return None
    every = np.concatenate([y for _, _, _, y in shown])
    levels = [curve.level for _, curve, _, _ in shown if curve.level is not None]
    across = _horizontal([(curve.name, x) for _, curve, x, _ in shown])
    up = _vertical([*every, *levels], share, log)
    ends = "; ".join(
        f"{curve.name or 'value'} from {_text(y[0], share)} to {_text(y[-1], share)}"
        for _, curve, _, y in shown
    )
    drawing = Drawing(WIDTH, HEIGHT, f"{label}: {ends}")
    _frame(drawing, across, up, share)
    for number, curve, x, y in shown:
        if curve.level is not None:
            place = up(curve.level)
            drawing.line(_LEFT, place, across.end, place, f"s-{number % SERIES} dotted")
        _curve(drawing, number, curve, x, y, across, up, share)
    _names(drawing, [(n, c.name, across(x[-1]), up(y[-1])) for n, c, x, y in shown if c.name])
    return drawing.markup()


def _horizontal(curves: Sequence[tuple[str, np.ndarray]]) -> Scale:
    """Steps on places that leave room for the name of each curve behind its end."""
    scale = fit(np.concatenate([x for _, x in curves]), _LEFT, WIDTH)
    scale = dataclasses.replace(scale, high=max(x[-1] for _, x in curves) or scale.high)
    end = WIDTH - 12
    for name, x in curves:
        room = WIDTH - _LEFT - 12 - _BOLD * text_width(name)
        share = (x[-1] - scale.low) / (scale.high - scale.low)
        end = min(end, _LEFT + max(room, WIDTH / 4) / max(share, 0.01))
    return dataclasses.replace(scale, end=end)


def _vertical(values: Sequence[float], share: bool, log: bool) -> Scale:
    bottom = HEIGHT - _BOTTOM
    if share:
        return Scale(0.0, max(1.0, *values) * 1.02, bottom, _TOP)
    return fit(values, bottom, _TOP, log=log and wants_log(values))


def _text(value: float, share: bool) -> str:
    return wording.percent(value) if share else wording.plain(value)


def _frame(drawing: Drawing, across: Scale, up: Scale, share: bool) -> None:
    bottom, right = HEIGHT - _BOTTOM, across.end
    tell: Callable[[float], str] = wording.short
    if share:
        tell = lambda value: f"{100 * value:g}\N{NO-BREAK SPACE}%"  # noqa: E731
    for tick in up.ticks(5):
        place = up(tick)
        drawing.line(_LEFT, place, right, place, "s-line")
        drawing.text(_LEFT - 5, place + FONT / 3, tell(tick), "end")
    for tick in across.ticks(4):
        place = across(tick)
        drawing.line(place, bottom, place, bottom + 4, "s-pale")
        drawing.text(place, bottom + 16, wording.short(tick), "middle")
    drawing.line(_LEFT, bottom, right, bottom, "s-pale")
    drawing.text((_LEFT + right) / 2, HEIGHT - 4, "steps", "middle")


def _curve(
    drawing: Drawing,
    number: int,
    curve: Series,
    x: np.ndarray,
    y: np.ndarray,
    across: Scale,
    up: Scale,
    share: bool,
) -> None:
    places = " ".join(f"{across(a):.1f},{up(b):.1f}" for a, b in zip(x, y))
    dash = {"stroke_dasharray": _DASHES[number % SERIES]} if number % SERIES else {}
    drawing.add("polyline", points=places, cls=f"curve s-{number % SERIES}", **dash)
    if len(x) > _FEW:
        return
    for a, b in zip(x, y):
        title = f"{curve.name} step {a:,.0f}: {_text(b, share)}".strip()
        drawing.add("circle", title=title, cx=across(a), cy=up(b), r=3, cls=f"f-{number % SERIES}")


def _names(drawing: Drawing, names: Sequence[tuple[int, str, float, float]]) -> None:
    """Names at the ends of their curves, moved apart where they would cover each other."""
    ordered = sorted(names, key=lambda name: name[3])
    places: list[float] = []
    for _, _, _, wanted in ordered:
        lowest = places[-1] + _LABEL_STEP if places else _TOP
        places.append(max(wanted + FONT / 3, lowest))
    beyond = max(0.0, places[-1] - (HEIGHT - _BOTTOM)) if places else 0.0
    for (number, name, x, _), place in zip(ordered, places):
        drawing.text(x + 6, place - beyond, name, cls=f"f-{number % SERIES} strong")

"""Checks of the settings of image operations."""

from __future__ import annotations

import math

from vlp_jax.errors import UserError


def check_count(op: str, value: int, name: str, unit: str = "pixels") -> None:
    """Raises UserError unless `value` is a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{op}: {name} must be a whole number of {unit} above 0, got {value!r}")


def check_number(op: str, value: float, name: str, low: float, high: float = math.inf) -> None:
    """Raises UserError unless `value` is a number in [low, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= high:
        bound = f"of at least {low:g}" if high == math.inf else f"from {low:g} to {high:g}"
        raise UserError(f"{op}: {name} must be a number {bound}, got {value!r}")


def check_range(op: str, low: float, high: float, name: str, bound: float = math.inf) -> None:
    """Raises UserError unless 0 < low <= high <= bound, for the settings min_ and max_`name`."""
    if not 0 < low <= high <= bound:
        last = "" if bound == math.inf else f" <= {bound:g}"
        raise UserError(f"{op}: needs 0 < min_{name} <= max_{name}{last}: {low}, {high}")


def check_fill(op: str, fill: int | tuple[int, int, int]) -> tuple[int, int, int]:
    """Returns a colour as three numbers from 0 to 255; a single number is a grey.

    Raises:
      UserError: it is neither.
    """
    color = (fill,) * 3 if isinstance(fill, int) else tuple(fill)
    if len(color) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
        raise UserError(f"{op}: fill must be one or three whole numbers 0 to 255, got {fill!r}")
    return color

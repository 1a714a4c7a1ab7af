"""Outlines of the shapes, and the boxes around them.

Coordinates are pixels of a 64 x 64 picture: x to the right, y down, (0, 0) the upper left corner of
the upper left pixel.
"""

from __future__ import annotations

import math

import numpy as np

IMAGE_SIZE = 64


def _regular(num_points: int, radii: tuple[float, ...]) -> np.ndarray:
    """Points on circles of `radii` in turn, the first straight up."""
    angles = -math.pi / 2 + 2 * math.pi * np.arange(num_points) / num_points
    lengths = np.resize(np.asarray(radii), num_points)
    return np.stack([np.cos(angles) * lengths, np.sin(angles) * lengths], axis=1)


def _heart(num_points: int = 60) -> np.ndarray:
    t = 2 * math.pi * np.arange(num_points) / num_points
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, -y], axis=1)


def _cross(arm: float = 0.36) -> np.ndarray:
    a = arm
    return np.array(
        [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a)]
        + [(a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
        dtype=np.float64,
    )


def _unit(points: np.ndarray, half_extent: float) -> np.ndarray:
    """`points` centered on their box and scaled to a larger half side of `half_extent`."""
    low, high = points.min(axis=0), points.max(axis=0)
    return (points - (low + high) / 2) * (2 * half_extent / (high - low).max())


# The half extents make shapes of one radius look about equally large.
_OUTLINES: dict[str, np.ndarray] = {
    "circle": _unit(_regular(64, (1.0,)), 0.95),
    "square": _unit(np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)], dtype=np.float64), 0.84),
    "triangle": _unit(_regular(3, (1.0,)), 1.02),
    "star": _unit(_regular(10, (1.0, 0.45)), 1.14),
    "cross": _unit(_cross(), 1.0),
    "heart": _unit(_heart(), 1.02),
}


def _dents(points: np.ndarray) -> tuple[int, ...]:
    # The sign of the turn at a dent differs from the sign of the outline's whole turn.
    before, after = points - np.roll(points, 1, axis=0), np.roll(points, -1, axis=0) - points
    turn = before[:, 0] * after[:, 1] - before[:, 1] * after[:, 0]
    return tuple(int(i) for i in np.flatnonzero(turn * np.sign(turn.sum()) < -1e-9))


# The numbers of the points at which an outline turns inwards.
DENTS: dict[str, tuple[int, ...]] = {shape: _dents(p) for shape, p in _OUTLINES.items()}


def outline(shape: str, x: float, y: float, radius: float, rotation: float) -> np.ndarray:
    """The polygon of a shape.

    Args:
      shape: a name of `vocabulary.SHAPES`.
      x, y: center in pixels.
      radius: nominal half size in pixels.
      rotation: clockwise on screen, in radians.

    Returns:
      float64 (points, 2): x and y in pixels.
    """
    cos, sin = math.cos(rotation) * radius, math.sin(rotation) * radius
    turn = np.array([[cos, sin], [-sin, cos]])
    return _OUTLINES[shape] @ turn + (x, y)


def bounds(points: np.ndarray) -> tuple[float, float, float, float]:
    """(left, top, right, bottom) of (points, 2), in the unit of the points."""
    left, top = points.min(axis=0)
    right, bottom = points.max(axis=0)
    return float(left), float(top), float(right), float(bottom)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Shared area of two (left, top, right, bottom) boxes over the area of the smaller, in [0, 1].

    It is never below their intersection over union, so a bound on it bounds that too.
    """
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller

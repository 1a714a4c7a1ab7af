"""Scenes of objects, sampled as a pure function of (seed, split, index), and their outlines.

Coordinates are pixels of a 64 x 64 picture: x to the right, y down, (0, 0) the upper left corner of
the upper left pixel.
"""

from __future__ import annotations

import colorsys
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data.shapes import vocabulary

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
    """The polygon of a shape: x and y in pixels, float64 [points, 2].

    `radius` is the nominal half size in pixels, `rotation` clockwise on screen, in radians.
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
    """Shared area of two (left, top, right, bottom) boxes over that of the smaller, 0 to 1."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    smaller = min((a[2] - a[0]) * (a[3] - a[1]), (b[2] - b[0]) * (b[3] - b[1]))
    return width * height / smaller


# sRGB prototypes, 0 to 255. Jitter keeps every color nearest to its own prototype.
COLOR_RGB: dict[str, tuple[int, int, int]] = {
    "red": (222, 36, 36),
    "orange": (250, 135, 15),
    "yellow": (248, 226, 40),
    "green": (34, 160, 58),
    "cyan": (60, 215, 222),
    "blue": (36, 84, 228),
    "purple": (140, 46, 196),
    "pink": (255, 140, 198),
}
BACKGROUND_RGB: dict[str, tuple[int, int, int]] = {
    "white": (238, 238, 236),
    "gray": (132, 134, 136),
    "black": (24, 24, 26),
    "beige": (206, 188, 156),
    "brown": (92, 66, 48),
    "navy": (26, 34, 70),
}
BACKGROUND_STYLES = ("flat", "gradient", "noise")
RADIUS_RANGE: dict[str, tuple[float, float]] = {"small": (8.2, 8.8), "large": (11.8, 12.6)}
# What a texture is drawn from: half of the objects are solid.
TEXTURE_URN = ("solid", "solid", "solid", "striped", "dotted", "outlined")
MAX_OVERLAP = 0.12
MIN_OFFSET = 9.0

_CELL_RANGES = ((12.0, 16.5), (29.8, 34.2), (47.5, 52.0))
_NUM_OBJECTS_CUMULATIVE = (0.5, 0.75, 0.9, 1.0)
_UNSEEN_FRACTION = 1 / 3
_MAX_ROTATION = math.radians(5)
_BORDER = 1.0

# Streams of one scene. Separate ones, so that a change of the grammar leaves the pictures alone.
STREAM_SCENE, STREAM_PIXELS, STREAM_CAPTIONS, STREAM_QUESTIONS = range(4)
STREAM_CLIP = 4


@dataclasses.dataclass(frozen=True)
class SceneObject:
    """One object: its names, and the exact numbers that it is drawn with (pixels, radians)."""

    color: str
    shape: str
    size: str
    texture: str
    position: str
    x: float
    y: float
    radius: float
    rotation: float
    rgb: tuple[float, float, float]
    texture_angle: float
    texture_phase: float

    @functools.cached_property
    def outline(self) -> np.ndarray:
        """float64 (points, 2): the polygon in pixels."""
        return outline(self.shape, self.x, self.y, self.radius, self.rotation)

    @functools.cached_property
    def box(self) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) in pixels."""
        return bounds(self.outline)

    @property
    def class_name(self) -> str:
        return f"{self.color} {self.shape}"

    @property
    def held_out(self) -> bool:
        return (self.color, self.shape) in vocabulary.HELD_OUT


@dataclasses.dataclass(frozen=True)
class Background:
    """A muted surface behind the objects; `rgb` 0 to 255, `amplitude` in the same unit."""

    name: str
    style: str
    rgb: tuple[float, float, float]
    angle: float
    amplitude: float


@dataclasses.dataclass(frozen=True)
class Scene:
    """A picture before it is drawn. `objects[0]` is the main (largest) object."""

    objects: tuple[SceneObject, ...]
    background: Background

    @property
    def unseen(self) -> bool:
        return any(o.held_out for o in self.objects)


def generator(seed: int, split: str, index: int, stream: int) -> np.random.Generator:
    """The random numbers of one purpose (`STREAM_*`) of one scene."""
    return np.random.default_rng([seed, vocabulary.SPLITS.index(split), index, stream])


def pick(rng: np.random.Generator, items: Sequence[Any]) -> Any:
    """One of `items`, uniformly."""
    return items[int(rng.random() * len(items))]


def jittered_rgb(rng: np.random.Generator, color: str) -> tuple[float, float, float]:
    """The prototype of `color` with a little change of hue, saturation and value; 0 to 255."""
    hue, saturation, value = colorsys.rgb_to_hsv(*(v / 255 for v in COLOR_RGB[color]))
    hue = (hue + rng.uniform(-0.012, 0.012)) % 1.0
    saturation = saturation * rng.uniform(0.92, 1.0)
    value = min(1.0, value * rng.uniform(0.93, 1.05))
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return red * 255, green * 255, blue * 255


def sample_background(rng: np.random.Generator) -> Background:
    """A background of any name and style."""
    name = pick(rng, vocabulary.BACKGROUNDS)
    shift = rng.uniform(-7, 7)
    return Background(
        name=name,
        style=pick(rng, BACKGROUND_STYLES),
        rgb=tuple(float(np.clip(v + shift, 0, 255)) for v in BACKGROUND_RGB[name]),
        angle=float(rng.uniform(0, 2 * math.pi)),
        amplitude=float(rng.uniform(5, 12)),
    )


def sample_combinations(
    rng: np.random.Generator, num_objects: int, split: str
) -> list[tuple[str, str]]:
    """(color, shape) of each object; held-out combinations in a third of the test scenes only.

    Later objects often share the shape or the color of an earlier one, which makes counts,
    comparisons and relations worth asking.
    """
    holds_unseen = split == "test" and rng.random() < _UNSEEN_FRACTION
    pool = vocabulary.ALL_COMBINATIONS if holds_unseen else vocabulary.SEEN
    forced = int(rng.integers(num_objects)) if holds_unseen else -1
    combinations: list[tuple[str, str]] = []
    for i in range(num_objects):
        candidates: Sequence[tuple[str, str]] = pool
        if i == forced:
            candidates = vocabulary.UNSEEN
        elif combinations and (share := rng.random()) < 0.5:
            earlier = pick(rng, combinations)
            axis = 0 if share < 0.2 else 1
            candidates = [c for c in pool if c[axis] == earlier[axis]]
        combinations.append(pick(rng, candidates))
    return combinations


def _placed(
    rng: np.random.Generator, combination: tuple[str, str], size: str, position: str
) -> SceneObject:
    """An object of `size`, its center well inside the cell of `position`, inside the picture."""
    shape = combination[1]
    radius = float(rng.uniform(*RADIUS_RANGE[size]))
    rotation = float(rng.uniform(-_MAX_ROTATION, _MAX_ROTATION))
    extent = bounds(outline(shape, 0.0, 0.0, radius, rotation))
    row, column = divmod(vocabulary.POSITIONS.index(position), 3)
    center = []
    for cell, low_extent, high_extent in ((column, extent[0], extent[2]), (row, *extent[1::2])):
        low = max(_CELL_RANGES[cell][0], _BORDER - low_extent)
        high = min(_CELL_RANGES[cell][1], IMAGE_SIZE - _BORDER - high_extent)
        center.append(float(rng.uniform(low, high)))
    return drawn_object(rng, combination, size, position, center, radius, rotation)


def drawn_object(
    rng: np.random.Generator,
    combination: tuple[str, str],
    size: str,
    position: str,
    center: Sequence[float],
    radius: float,
    rotation: float,
) -> SceneObject:
    """An object with a texture and a shade of its color that are drawn at random."""
    color, shape = combination
    texture, rgb = pick(rng, TEXTURE_URN), jittered_rgb(rng, color)
    angle, phase = float(rng.uniform(0, math.pi)), float(rng.random())
    names = (color, shape, size, texture, position)
    return SceneObject(*names, *center, radius, rotation, rgb, angle, phase)


def _arranged(rng: np.random.Generator, combinations: list[tuple[str, str]]) -> list[SceneObject]:
    """Objects in distinct cells that hardly overlap; sizes are drawn again with the places."""
    num_objects = len(combinations)
    large_fraction = (0.6, 0.5, 0.4, 0.3)[num_objects - 1]
    # Drawing everything again keeps all arrangements equally likely; moving one object would not.
    while True:
        cells = rng.permutation(len(vocabulary.POSITIONS))[:num_objects]
        objects: list[SceneObject] = []
        for combination, cell in zip(combinations, cells, strict=True):
            size = "large" if rng.random() < large_fraction else "small"
            candidate = _placed(rng, combination, size, vocabulary.POSITIONS[cell])
            if any(overlap(candidate.box, o.box) > MAX_OVERLAP for o in objects):
                break
            objects.append(candidate)
        else:
            return objects


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene number `index` of `split`.

    One object in half of the scenes, two to four in the others. Held-out combinations of color and
    shape occur in about a third of the test scenes and nowhere else.
    """
    rng = generator(seed, split, index, STREAM_SCENE)
    num_objects = 1 + int(np.searchsorted(_NUM_OBJECTS_CUMULATIVE, rng.random(), side="right"))
    combinations = sample_combinations(rng, num_objects, split)
    objects = _arranged(rng, combinations)
    # The largest object gives the picture its label.
    objects.sort(key=lambda o: -o.radius)
    return Scene(objects=tuple(objects), background=sample_background(rng))


def relations(a: SceneObject, b: SceneObject) -> list[str]:
    """How `a` clearly lies to `b`: none, one or two of "left" or "right", "above" or "below"."""
    x, y = b.x - a.x, b.y - a.y
    found = ["left" if x > 0 else "right"] if abs(x) >= max(MIN_OFFSET, 0.5 * abs(y)) else []
    if abs(y) >= max(MIN_OFFSET, 0.5 * abs(x)):
        found.append("above" if y > 0 else "below")
    return found

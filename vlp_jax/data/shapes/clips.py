"""Short clips of one or two moving objects, and captions of the motion."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from jaxtyping import UInt8

from vlp_jax.data.shapes import captions, render, scenes, vocabulary
from vlp_jax.data.shapes.scenes import Background, SceneObject, pick

NUM_FRAMES = 8
CAPTIONS_PER_CLIP = 4
MAX_OVERLAP = 0.1

_STEPS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
# Singular verbs: every clause of a caption has one object for its subject.
MOTION_PHRASES: dict[str, tuple[str, ...]] = {
    "left": ("moves to the left", "moves left", "slides to the left", "travels left"),
    "right": ("moves to the right", "moves right", "slides to the right", "travels right"),
    "up": ("moves up", "rises", "goes up", "slides up"),
    "down": ("moves down", "sinks", "goes down", "slides down"),
    "grow": ("grows", "gets bigger", "becomes larger", "gets larger"),
    "shrink": ("shrinks", "gets smaller", "becomes smaller"),
    "spin": ("spins", "rotates", "turns around"),
    "still": ("stays still", "does not move", "stays in place"),
}
_ON_BACKGROUND = ("{} on a {bg} background", "on a {bg} background {}")


@dataclasses.dataclass(frozen=True)
class MovingObject:
    """An object in each frame of a clip; `motion` is in `vocabulary.MOTIONS`."""

    motion: str
    frames: tuple[SceneObject, ...]

    @property
    def start(self) -> SceneObject:
        return self.frames[0]


@dataclasses.dataclass(frozen=True)
class Clip:
    """A clip before it is drawn. `objects[0]` is the main one."""

    objects: tuple[MovingObject, ...]
    background: Background

    @property
    def unseen(self) -> bool:
        return any(o.start.held_out for o in self.objects)


def _moving(rng: np.random.Generator, combination: tuple[str, str], motion: str) -> MovingObject:
    """An object on a random path that stays inside the picture."""
    shape = combination[1]
    progress = np.linspace(0.0, 1.0, NUM_FRAMES)
    radii = np.full(NUM_FRAMES, rng.uniform(8.0, 12.0))
    if motion in ("grow", "shrink"):
        radii = rng.uniform(6.5, 7.5) * (1 + rng.uniform(0.7, 0.95) * progress)
        radii = radii if motion == "grow" else radii[::-1]
    angles = np.full(NUM_FRAMES, rng.uniform(-math.radians(14), math.radians(14)))
    if motion == "spin":
        angles = angles + pick(rng, (-1, 1)) * math.radians(rng.uniform(70, 100)) * progress
    distance = rng.uniform(18.0, 28.0)
    step = np.asarray(_STEPS.get(motion, (0, 0)), np.float64)
    path = progress[:, None] * distance * step
    corners = np.array(
        [
            scenes.bounds(scenes.outline(shape, dx, dy, radius, angle))
            for (dx, dy), radius, angle in zip(path, radii, angles, strict=True)
        ]
    )
    # The corners over the whole path say how far the start may lie from each edge.
    low, high = 1.0 - corners[:, :2].min(axis=0), scenes.IMAGE_SIZE - 1.0 - corners[:, 2:].max(0)
    origin = rng.uniform(low, high)
    still = scenes.drawn_object(
        rng, combination, "large", "", origin.tolist(), float(radii[0]), float(angles[0])
    )
    frames = tuple(
        dataclasses.replace(
            still,
            x=float(origin[0] + dx),
            y=float(origin[1] + dy),
            radius=float(radius),
            rotation=float(angle),
            # The texture turns with the object.
            texture_angle=still.texture_angle + float(angle - angles[0]),
        )
        for (dx, dy), radius, angle in zip(path, radii, angles, strict=True)
    )
    return MovingObject(motion, frames)


def _collide(a: MovingObject, b: MovingObject) -> bool:
    pairs = zip(a.frames, b.frames, strict=True)
    return any(scenes.overlap(p.box, q.box) > MAX_OVERLAP for p, q in pairs)


def sample_clip(seed: int, split: str, index: int) -> Clip:
    """The clip number `index` of `split`: one object in 60 % of the clips, else two."""
    rng = scenes.generator(seed, split, index, scenes.STREAM_CLIP)
    num_objects = 1 if rng.random() < 0.6 else 2
    combinations = scenes.sample_combinations(rng, num_objects, split)
    # A circle that turns looks like one that does not.
    motions = [
        pick(rng, [m for m in vocabulary.MOTIONS if (m, shape) != ("spin", "circle")])
        for _, shape in combinations
    ]
    while True:
        objects = [_moving(rng, c, m) for c, m in zip(combinations, motions, strict=True)]
        if num_objects == 1 or not _collide(*objects):
            break
    return Clip(tuple(objects), scenes.sample_background(rng))


def render_clip(clip: Clip, rng: np.random.Generator) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames of a clip, uint8 (8, 64, 64, 3), over one background that does not change."""
    background = render.draw_background(clip.background, rng)
    frames = []
    for i in range(NUM_FRAMES):
        canvas = background.copy()
        for obj in clip.objects:
            render.paint(canvas, obj.frames[i])
        frames.append(render.quantized(canvas))
    return np.stack(frames)


def _clause(obj: MovingObject, attributes: frozenset[str], rng: np.random.Generator) -> str:
    subject = captions.indefinite(obj.start, attributes, rng)
    if " that is " in subject:
        subject = vocabulary.with_article(captions.noun_phrase(obj.start, attributes, rng))
    return f"{subject} {pick(rng, MOTION_PHRASES[obj.motion])}"


def _attributes(rng: np.random.Generator) -> frozenset[str]:
    return frozenset(
        a for a, p in (("shape", 0.75), ("color", 0.65), ("texture", 0.3)) if rng.random() < p
    )


def _join(clauses: list[str], rng: np.random.Generator) -> str:
    return pick(rng, (" while ", " and ")).join(clauses)


def clip_captions(clip: Clip, rng: np.random.Generator) -> list[str]:
    """`CAPTIONS_PER_CLIP` different captions; the first names all objects and the background.

    Every one is true of the clip and has at most `vocabulary.MAX_CAPTION_TOKENS` tokens; what
    depends on the horizontal direction holds the word "left" or "right".
    """
    full = frozenset({"texture", "color", "shape"})
    objects = list(clip.objects)
    made = [_clause(objects[i], full, rng) for i in rng.permutation(len(objects))]
    detailed = pick(rng, _ON_BACKGROUND).format(_join(made, rng), bg=clip.background.name)
    texts = [detailed]
    while len(texts) < CAPTIONS_PER_CLIP:
        if rng.random() < 0.5:
            text = _clause(pick(rng, objects), _attributes(rng), rng)
        else:
            attributes = _attributes(rng)
            order = rng.permutation(len(objects))
            text = _join([_clause(objects[i], attributes, rng) for i in order], rng)
        if text not in texts:
            texts.append(text)
    return texts

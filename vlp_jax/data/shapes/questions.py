"""Questions about a scene with answers from the closed vocabulary `vocabulary.ANSWERS`.

For a yes-or-no question the answer is drawn first and a question with that answer is made after, so
that neither the kind nor the wording of a question gives it away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from vlp_jax.data.shapes import scenes, vocabulary
from vlp_jax.data.shapes.captions import PLURALS, matching
from vlp_jax.data.shapes.scenes import Scene, SceneObject, pick

QUESTIONS_PER_SCENE = 6

_VALUES = {
    "color": vocabulary.COLORS,
    "shape": vocabulary.SHAPES,
    "size": vocabulary.SIZES,
    "texture": vocabulary.TEXTURES,
}
_DESCRIPTIONS = tuple(
    frozenset(names.split())
    for names in (
        *("shape", "color", "color shape", "texture shape", "texture color"),
        *("size shape", "size color", "size color shape", "texture color shape"),
    )
)


@dataclasses.dataclass(frozen=True)
class Question:
    """`answer` is in `vocabulary.ANSWERS`, `kind` in `vocabulary.QUESTION_KINDS`."""

    question: str
    answer: str
    kind: str


Combinations = frozenset[tuple[str, str]]


def _phrase(values: dict[str, str], plural: bool = False) -> str:
    noun = values.get("shape", "object")
    words = [values[a] for a in ("size", "texture", "color") if a in values]
    return " ".join([*words, PLURALS[noun] if plural else noun])


def _values(obj: SceneObject, attributes: frozenset[str]) -> dict[str, str]:
    return {a: getattr(obj, a) for a in attributes}


def _count(scene: Scene, values: dict[str, str]) -> int:
    return sum(all(getattr(o, a) == v for a, v in values.items()) for o in scene.objects)


def _the(scene: Scene, obj: SceneObject, rng: np.random.Generator, exclude: str = "") -> str | None:
    """ "the red circle" by attributes that only `obj` has, `exclude` not among them, or None."""
    unique = [d for d in _DESCRIPTIONS if exclude not in d and matching(scene.objects, obj, d) == 1]
    if len(scene.objects) == 1 and (not unique or rng.random() < 0.3):
        return "the object"
    return f"the {_phrase(_values(obj, pick(rng, unique)))}" if unique else None


_WORDINGS: dict[str, tuple[str, ...]] = {
    "color": ("what color is {}?", "what is the color of {}?"),
    "shape": ("what shape is {}?", "which shape does {} have?"),
    "size": ("is {} small or large?", "what size is {}?"),
    "texture": ("what is the texture of {}?", "which texture does {} have?"),
    "position": ("where is {}?", "in which part of the picture is {}?"),
}


def _attribute(kind: str) -> Callable[..., Question | None]:
    def ask(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question | None:
        obj = pick(rng, scene.objects)
        name = _the(scene, obj, rng, exclude=kind)
        if name is None:
            return None
        return Question(pick(rng, _WORDINGS[kind]).format(name), getattr(obj, kind), kind)

    return ask


def _background(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question:
    text = pick(rng, ("what color is the background?", "which background is it?"))
    return Question(text, scene.background.name, "background")


def _absent(
    scene: Scene, values: dict[str, str], rng: np.random.Generator, allowed: Combinations
) -> dict[str, str] | None:
    """`values` with one of them changed so that no object has them all; None if it fails."""
    # Sorted, because the names come from a set, whose order differs between processes.
    attribute = pick(rng, sorted(values))
    changed = values | {attribute: pick(rng, _VALUES[attribute])}
    if _count(scene, changed):
        return None
    # Some combinations of color and shape must not be named in this split.
    named = (changed.get("color"), changed.get("shape"))
    return changed if None in named or named in allowed else None


def _how_many(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question | None:
    if rng.random() < 0.25:
        number = len(scene.objects)
        return Question("how many objects are there?", vocabulary.COUNTS[number], "count")
    values: dict[str, str] | None = _values(pick(rng, scene.objects), pick(rng, _DESCRIPTIONS[:5]))
    if rng.random() < 0.25:
        values = _absent(scene, values, rng, allowed)
    if values is None:
        return None
    text = f"how many {_phrase(values, plural=True)} are there?"
    return Question(text, vocabulary.COUNTS[_count(scene, values)], "count")


def _existence(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question:
    present = rng.random() < 0.5
    while True:
        values = _values(pick(rng, scene.objects), pick(rng, _DESCRIPTIONS))
        if not present:
            values = _absent(scene, values, rng, allowed)
        if values is not None:
            break
    name = vocabulary.with_article(_phrase(values))
    text = pick(rng, ("is there {}?", "does the picture contain {}?")).format(name)
    return Question(text, "yes" if present else "no", "existence")


def _two(scene: Scene, rng: np.random.Generator) -> tuple[SceneObject, SceneObject]:
    i, j = rng.permutation(len(scene.objects))[:2]
    return scene.objects[i], scene.objects[j]


_OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
_RELATION_WORDS = {"left": "left of", "right": "right of", "above": "above", "below": "below"}


def _relation(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question | None:
    if len(scene.objects) < 2:
        return None
    a, b = _two(scene, rng)
    known = scenes.relations(a, b)
    first, second = _the(scene, a, rng), _the(scene, b, rng)
    if not known or first is None or second is None:
        return None
    direction = pick(rng, known)
    if len(scene.objects) == 2 and rng.random() < 0.4:
        asked = pick(rng, ("color", "shape"))
        text = f"what {asked} is the object {_RELATION_WORDS[direction]} {second}?"
        return Question(text, getattr(a, asked), "relation")
    holds = rng.random() < 0.5
    words = _RELATION_WORDS[direction if holds else _OPPOSITE[direction]]
    return Question(f"is {first} {words} {second}?", "yes" if holds else "no", "relation")


def _larger(scene: Scene, rng: np.random.Generator) -> Question | None:
    a, b = _two(scene, rng)
    first, second = _the(scene, a, rng, "size"), _the(scene, b, rng, "size")
    if a.size == b.size or first is None or second is None:
        return None
    holds = rng.random() < 0.5
    word = "larger" if (a.size == "large") == holds else "smaller"
    return Question(f"is {first} {word} than {second}?", "yes" if holds else "no", "comparison")


def _more(scene: Scene, rng: np.random.Generator) -> Question | None:
    attribute = pick(rng, ("shape", "color"))
    one, other = ({attribute: pick(rng, _VALUES[attribute])} for _ in range(2))
    if _count(scene, one) == _count(scene, other):
        return None
    holds = rng.random() < 0.5
    if (_count(scene, one) > _count(scene, other)) != holds:
        one, other = other, one
    text = f"are there more {_phrase(one, plural=True)} than {_phrase(other, plural=True)}?"
    return Question(text, "yes" if holds else "no", "comparison")


def _same(scene: Scene, rng: np.random.Generator) -> Question | None:
    """Asked only where some pair is alike and another is not, or "no" would be the usual answer."""
    attribute = pick(rng, ("shape", "color"))
    number = len({getattr(o, attribute) for o in scene.objects})
    if number in (1, len(scene.objects)):
        return None
    holds = rng.random() < 0.5
    pairs = [(a, b) for a in scene.objects for b in scene.objects if a is not b]
    # `number` is neither 1 nor all, so there are pairs of both sorts.
    fitting = [p for p in pairs if (getattr(p[0], attribute) == getattr(p[1], attribute)) == holds]
    a, b = pick(rng, fitting)
    first, second = _the(scene, a, rng, attribute), _the(scene, b, rng, attribute)
    if first is None or second is None:
        return None
    text = f"do {first} and {second} have the same {attribute}?"
    return Question(text, "yes" if holds else "no", "comparison")


def _comparison(scene: Scene, rng: np.random.Generator, allowed: Combinations) -> Question | None:
    if len(scene.objects) < 2:
        return None
    return pick(rng, (_larger, _more, _same))(scene, rng)


_ASK: dict[str, Callable[..., Question | None]] = {
    **{kind: _attribute(kind) for kind in ("color", "shape", "size", "texture", "position")},
    **{"background": _background, "count": _how_many, "existence": _existence},
    **{"relation": _relation, "comparison": _comparison},
}


def scene_questions(scene: Scene, split: str, rng: np.random.Generator) -> list[Question]:
    """`QUESTIONS_PER_SCENE` different questions of varied kinds.

    Outside the test split no question names a held-out combination, present or absent.
    """
    allowed = frozenset(vocabulary.ALL_COMBINATIONS if split == "test" else vocabulary.SEEN)
    questions: list[Question] = []
    texts: set[str] = set()
    while True:
        for i in rng.permutation(len(vocabulary.QUESTION_KINDS)):
            made = _ASK[vocabulary.QUESTION_KINDS[i]](scene, rng, allowed)
            if made is not None and made.question not in texts:
                texts.add(made.question)
                questions.append(made)
            if len(questions) == QUESTIONS_PER_SCENE:
                return questions

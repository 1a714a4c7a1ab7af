"""English captions of a scene, from a grammar that names a varying part of what is in it.

Every caption is true of its scene: "a star" asserts that there is one, "the star" that there is
exactly one, a number ("two circles", "one star") that there are exactly so many. A caption whose
truth depends on the horizontal direction holds "left" or "right" as a whole word.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from vlp_jax.data.shapes import scenes, vocabulary
from vlp_jax.data.shapes.scenes import Scene, SceneObject, pick

ADJECTIVES = ("size", "texture", "color")
FULL = frozenset({"size", "texture", "color", "shape"})

# A word that occurs twice is drawn twice as often; so are the frames below.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "small": ("small", "small", "little", "tiny"),
    "large": ("large", "large", "big"),
    "solid": ("solid", "solid", "plain"),
    "striped": ("striped",),
    "dotted": ("dotted", "dotted", "spotted"),
    "outlined": ("outlined", "outlined", "hollow"),
}
PLURALS: dict[str, str] = {
    noun: f"{noun}es" if noun.endswith("s") else f"{noun}s"
    for noun in (*vocabulary.SHAPES, "object", "shape")
}

_FRAMES = (
    *("{}", "{}", "a picture of {}", "an image of {}", "a drawing of {}", "a picture with {}"),
    *("there {be} {}", "there {be} {}", "we see {}", "you can see {}", "the picture shows {}"),
    *("the image contains {}", "here {be} {}", "{} can be seen"),
)
_ON_BACKGROUND = (
    "{} on a {bg} background",
    "{} on a {bg} background",
    "{} against a {bg} background",
    "{} in front of a {bg} background",
)
_SHORT_POSITION = {
    "top": "at the top",
    "bottom": "at the bottom",
    "left": "on the left",
    "right": "on the right",
    "center": "in the center",
}
_RELATIONS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of", "on the left of"),
    "right": ("right of", "to the right of", "on the right of"),
    "above": ("above", "higher than", "over"),
    "below": ("below", "lower than", "under"),
}


def matching(scene_objects: Sequence[SceneObject], like: SceneObject, attributes) -> int:
    """How many objects share the named `attributes` of `like`."""
    return sum(all(getattr(o, a) == getattr(like, a) for a in attributes) for o in scene_objects)


def adjectives(obj: SceneObject, attributes: frozenset[str], rng: np.random.Generator) -> list[str]:
    """The adjectives for `attributes`, in English order, with synonyms."""
    values = (getattr(obj, a) for a in ADJECTIVES if a in attributes)
    return [pick(rng, SYNONYMS[v]) if v in SYNONYMS else v for v in values]


def noun_phrase(obj: SceneObject, attributes: frozenset[str], rng: np.random.Generator) -> str:
    """Adjectives and a noun, without an article: "large red circle", "striped object"."""
    noun = obj.shape if "shape" in attributes else pick(rng, ("shape", "object"))
    return " ".join([*adjectives(obj, attributes, rng), noun])


def position_phrase(position: str, rng: np.random.Generator) -> str:
    """ "at the top left", "in the center", ..."""
    if " " not in position:
        if position == "center" and rng.random() < 0.4:
            return "in the middle"
        return _SHORT_POSITION[position]
    return pick(rng, ("at the {}", "in the {}", "in the {} corner")).format(position)


def indefinite(obj: SceneObject, attributes: frozenset[str], rng: np.random.Generator) -> str:
    """A mention with an indefinite article: "a red star", "something large and red"."""
    words = adjectives(obj, attributes, rng)
    if "shape" not in attributes and rng.random() < 0.5:
        phrase = " ".join(["something", " and ".join(words)]).strip()
    elif words and "shape" in attributes and rng.random() < 0.08:
        phrase = f"{vocabulary.with_article(obj.shape)} that is {' and '.join(words)}"
    else:
        phrase = vocabulary.with_article(noun_phrase(obj, attributes, rng))
    if "position" in attributes:
        phrase = f"{phrase} {position_phrase(obj.position, rng)}"
    return phrase


def join(phrases: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    if len(phrases) == 1:
        return phrases[0]
    return f"{', '.join(phrases[:-1])} and {phrases[-1]}"


def some_attributes(rng: np.random.Generator, position: bool = True) -> frozenset[str]:
    """A random, not empty part of what can be named of an object."""
    chances = {"shape": 0.95, "color": 0.5, "size": 0.15, "texture": 0.15, "position": 0.15}
    while True:
        chosen = frozenset(a for a, p in chances.items() if rng.random() < p)
        if not position:
            chosen -= {"position"}
        if chosen:
            return chosen


def sentence(phrase: str, rng: np.random.Generator) -> str:
    """`phrase` in one of the frames ("there is ...", "a picture of ...")."""
    # COUNTS has the word of each number at its place, so these are "two" and more.
    plural = phrase.split(" ", 1)[0] in vocabulary.COUNTS[2:]
    return pick(rng, _FRAMES).format(phrase, be="are" if plural else "is")


def on_background(text: str, scene: Scene, rng: np.random.Generator) -> str:
    """`text` with the background named after it."""
    return pick(rng, _ON_BACKGROUND).format(text, bg=scene.background.name)


def detailed(scene: Scene, rng: np.random.Generator) -> str:
    """Every object with its size, texture, color and shape, the background, and positions.

    One or two objects: all of their positions. Three: as many positions as fit into
    `MAX_CAPTION_TOKENS`. Four: the adjectives and the background take up the room.
    """
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    phrases: list[str] = []
    for obj in objects:
        phrase = noun_phrase(obj, FULL, rng)
        # The first word of an earlier phrase is its article, or "another".
        again = any(p.split(" ", 1)[1] == phrase for p in phrases)
        phrases.append(f"another {phrase}" if again else vocabulary.with_article(phrase))
    # Four tokens are kept for "on a white background".
    room = vocabulary.MAX_CAPTION_TOKENS - vocabulary.num_tokens(join(phrases)) - 4
    for i, obj in enumerate(objects):
        place = position_phrase(obj.position, rng)
        if vocabulary.num_tokens(place) > 4 and len(objects) > 1:
            place = f"at the {obj.position}"
        if vocabulary.num_tokens(place) <= room:
            room -= vocabulary.num_tokens(place)
            phrases[i] = f"{phrases[i]} {place}"
    plain = join(phrases)
    for _ in range(3):
        text = on_background(sentence(plain, rng), scene, rng)
        if vocabulary.num_tokens(text) <= vocabulary.MAX_CAPTION_TOKENS:
            return text
    return f"{plain} on a {scene.background.name} background"


def mention(scene: Scene, rng: np.random.Generator) -> str:
    """One object, with some of its attributes; sometimes the background."""
    text = sentence(indefinite(pick(rng, scene.objects), some_attributes(rng), rng), rng)
    return on_background(text, scene, rng) if rng.random() < 0.12 else text


def listing(scene: Scene, rng: np.random.Generator) -> str | None:
    """All objects, each with the same attributes; None if two would be called the same."""
    attributes = some_attributes(rng, position=len(scene.objects) < 4)
    objects = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    if any(matching(objects, o, attributes) > 1 for o in objects):
        return None
    text = sentence(join([indefinite(o, attributes, rng) for o in objects]), rng)
    return on_background(text, scene, rng) if rng.random() < 0.15 else text


def _reference(scene: Scene, obj: SceneObject, rng: np.random.Generator) -> str:
    """A mention that may be definite ("the star") where only one object answers to it."""
    attributes = some_attributes(rng, position=False)
    phrase = noun_phrase(obj, attributes, rng)
    if matching(scene.objects, obj, attributes) == 1 and rng.random() < 0.5:
        return f"the {phrase}"
    return vocabulary.with_article(phrase)


def relation(scene: Scene, rng: np.random.Generator) -> str | None:
    """Two objects and how they lie: "a red circle is left of a star"; None if not clear."""
    i, j = rng.permutation(len(scene.objects))[:2]
    a, b = scene.objects[i], scene.objects[j]
    known = scenes.relations(a, b)
    if not known:
        return None
    words = pick(rng, _RELATIONS[pick(rng, known)])
    first, second = _reference(scene, a, rng), _reference(scene, b, rng)
    if first.split(" ", 1)[1] == second.split(" ", 1)[1]:
        return None
    copula = " is " if first.startswith("the ") or rng.random() < 0.5 else " "
    return f"{first}{copula}{words} {second}"


def _counted(number: int, adjective: str, noun: str) -> str:
    noun = noun if number == 1 else PLURALS[noun]
    return " ".join(w for w in (vocabulary.COUNTS[number], adjective, noun) if w)


def counting(scene: Scene, rng: np.random.Generator) -> str:
    """Exact numbers: "two circles and one star", "three red shapes", "one object"."""
    chance = rng.random()
    if chance < 0.25:
        noun = pick(rng, ("shape", "object"))
        return sentence(_counted(len(scene.objects), "", noun), rng)
    if chance < 0.5:
        color = pick(rng, scene.objects).color
        number = sum(o.color == color for o in scene.objects)
        return sentence(_counted(number, color, pick(rng, ("shape", "object"))), rng)
    groups: dict[str, list[SceneObject]] = {}
    for i in rng.permutation(len(scene.objects)):
        groups.setdefault(scene.objects[i].shape, []).append(scene.objects[i])
    phrases = []
    for shape, members in groups.items():
        colors = {o.color for o in members}
        color = members[0].color if len(colors) == 1 and rng.random() < 0.5 else ""
        phrases.append(_counted(len(members), color, shape))
    return sentence(join(phrases), rng)


def comparison(scene: Scene, rng: np.random.Generator) -> str | None:
    """Two objects of different size: "the star is bigger than the red circle"; None if alike."""
    i, j = rng.permutation(len(scene.objects))[:2]
    a, b = scene.objects[i], scene.objects[j]
    if a.size == b.size:
        return None
    words = ("larger than", "bigger than") if a.size == "large" else ("smaller than",)
    attributes = some_attributes(rng, position=False) - {"size"} or frozenset({"shape"})
    if any(matching(scene.objects, o, attributes) > 1 for o in (a, b)):
        return None
    first, second = noun_phrase(a, attributes, rng), noun_phrase(b, attributes, rng)
    return f"the {first} is {pick(rng, words)} the {second}"


def background_first(scene: Scene, rng: np.random.Generator) -> str:
    """The background and an object: "a gray background with a red star"."""
    thing = indefinite(pick(rng, scene.objects), some_attributes(rng), rng)
    return f"a {scene.background.name} background with {thing}"


_Kind = Callable[[Scene, np.random.Generator], "str | None"]
# Each kind with the sum of the chances up to it.
_ONE_OBJECT: tuple[tuple[_Kind, float], ...] = (
    *((mention, 0.87), (counting, 0.93), (background_first, 1.0)),
)
_SEVERAL: tuple[tuple[_Kind, float], ...] = (
    *((listing, 0.34), (mention, 0.58), (relation, 0.79)),
    *((counting, 0.91), (comparison, 0.97), (background_first, 1.0)),
)


def varied(scene: Scene, rng: np.random.Generator) -> str:
    """A caption of a random kind that names a part of the scene, within the token limit."""
    kinds = _ONE_OBJECT if len(scene.objects) == 1 else _SEVERAL
    while True:
        chance = rng.random()
        text = next(kind for kind, upto in kinds if chance < upto)(scene, rng)
        # Below the limit, which leaves room for a full stop.
        if text and vocabulary.num_tokens(text) < vocabulary.MAX_CAPTION_TOKENS:
            return f"{text}." if rng.random() < 0.15 else text


def scene_captions(scene: Scene, rng: np.random.Generator) -> list[str]:
    """`CAPTIONS_PER_SCENE` different captions, the detailed one first.

    The others name a varying part of the scene, which teaches a contrastive model what each word
    means: from captions that name everything it learns whole combinations by heart.
    """
    captions = [detailed(scene, rng)]
    while len(captions) < vocabulary.CAPTIONS_PER_SCENE:
        text = varied(scene, rng)
        if text not in captions:
            captions.append(text)
    return captions

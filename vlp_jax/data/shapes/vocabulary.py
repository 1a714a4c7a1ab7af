"""The closed vocabulary of the dataset: names of every attribute, classes, splits and answers."""

from __future__ import annotations

import re

COLORS: tuple[str, ...] = ("red", "orange", "yellow", "green", "cyan", "blue", "purple", "pink")
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "heart")
SIZES: tuple[str, ...] = ("small", "large")
TEXTURES: tuple[str, ...] = ("solid", "striped", "dotted", "outlined")
POSITIONS: tuple[str, ...] = (
    *("top left", "top", "top right"),
    *("left", "center", "right"),
    *("bottom left", "bottom", "bottom right"),
)
BACKGROUNDS: tuple[str, ...] = ("white", "gray", "black", "beige", "brown", "navy")
MOTIONS: tuple[str, ...] = ("left", "right", "up", "down", "grow", "shrink", "spin", "still")

CLASS_NAMES: tuple[str, ...] = tuple(f"{color} {shape}" for color in COLORS for shape in SHAPES)

# One combination per color, one or two per shape: every color is trained in 5 of its 6 shapes and
# every shape in at least 6 of its 8 colors.
HELD_OUT: frozenset[tuple[str, str]] = frozenset(
    {
        ("red", "star"),
        ("orange", "square"),
        ("yellow", "heart"),
        ("green", "triangle"),
        ("cyan", "circle"),
        ("blue", "cross"),
        ("purple", "square"),
        ("pink", "circle"),
    }
)
ALL_COMBINATIONS: tuple[tuple[str, str], ...] = tuple((c, s) for c in COLORS for s in SHAPES)
SEEN: tuple[tuple[str, str], ...] = tuple(p for p in ALL_COMBINATIONS if p not in HELD_OUT)
UNSEEN: tuple[tuple[str, str], ...] = tuple(p for p in ALL_COMBINATIONS if p in HELD_OUT)

SPLITS: tuple[str, ...] = ("train", "validation", "test")
COUNTS: tuple[str, ...] = ("zero", "one", "two", "three", "four")
QUESTION_KINDS: tuple[str, ...] = (
    *("color", "shape", "size", "texture", "position"),
    *("background", "count", "existence", "relation", "comparison"),
)
ANSWERS: tuple[str, ...] = (
    ("yes", "no") + COUNTS + COLORS + SHAPES + SIZES + TEXTURES + POSITIONS + BACKGROUNDS
)

MAX_CAPTION_TOKENS = 28
CAPTIONS_PER_SCENE = 6

# Words and punctuation marks, as CLIP's tokenizer would split plain captions.
_TOKEN = re.compile(r"\w+|[^\w\s]")


def num_tokens(text: str) -> int:
    """Number of words and punctuation marks in `text`."""
    return len(_TOKEN.findall(text))


def with_article(phrase: str) -> str:
    """`phrase` with "a" or "an" before it; here the first letter of a word decides."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def class_prompts(class_name: str) -> tuple[str, ...]:
    """Sentences that name `class_name` ("red circle") for zero-shot classification."""
    noun = with_article(class_name)
    return (noun, f"a picture of {noun}", f"there is {noun}", f"an image of {noun}")

"""Numbers of classes from the labels that a table holds: whole numbers, or words."""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.files import read_lines

# More are taken for identifiers: a classifier has a row of weights for each number up to it.
MAX_CLASSES = 2**20
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]*)?")
_NAMED = 5  # labels that a message lists


class WordClasses(tuple[str, ...]):
    """Names of classes in alphabetical order of the words that one table happens to hold.

    Their numbers mean nothing outside of that table, so they are compared by name.
    """


def label_text(value: Any) -> str | None:
    """Converts a label in a table to text; None if there is none."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, str | int | float):
        return None
    # pandas writes whole numbers as "3.0" if a column has gaps.
    text = unicodedata.normalize("NFC", str(value).strip())
    whole = text.partition(".")[0] if _is_whole(text) else text
    return whole if value == value and whole else None


def open_names(names: Sequence[str] | str | None, key: str) -> tuple[str, ...] | None:
    """Reads a list of classes, each named once, or the file that it names, with a class a line."""
    if names is None:
        return None
    given = read_lines(names, key) if isinstance(names, str) else tuple(names)
    found = tuple(label_text(name) or "" for name in given)
    wrong = [name for name, count in Counter(found).items() if not name or count > 1]
    if wrong or not found:
        raise UserError(f"{key} must name each class once: {listed(wrong) or 'it has no name'}")
    return found


def number_labels(
    labels: Mapping[str, str], names: Sequence[str] | None, key: str
) -> tuple[dict[str, int], tuple[str, ...] | None]:
    """Numbers labels; returns the number of each, and the names of the classes if known.

    Whole numbers mean what they say. Words are numbered by their place in `names`, and without that
    in alphabetical order. `labels` are as `label_text` gives them, each with its first place for
    messages; `key` is the setting that gives `names`.

    Raises:
      UserError: a number that is no class, a word that is not in `names`, or numbers and words.
    """
    places = {name: number for number, name in enumerate(names or ())}
    if names is not None and all(label in places for label in labels):
        return {label: places[label] for label in labels}, tuple(names)
    numbers = [label for label in labels if _NUMBER.fullmatch(label)]
    words = [label for label in labels if not _NUMBER.fullmatch(label)]
    if names is not None and words:
        unknown = [label for label in labels if label not in places]
        nearest = difflib.get_close_matches(unknown[0], places, n=1, cutoff=0.5)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
        raise UserError(f"{labels[unknown[0]]}: {key} lacks the label {listed(unknown)}{hint}")
    if words and numbers:
        raise UserError(
            f"{labels[words[0]]} has the label {words[0]!r} and {labels[numbers[0]]} the label "
            f"{numbers[0]!r}: give either numbers or words, or list all names in {key}"
        )
    if words:
        classes = WordClasses(sorted(words))
        return {label: number for number, label in enumerate(classes)}, classes
    # "01" and "1" are one class; a number with a fraction is none.
    below = MAX_CLASSES if names is None else len(names)
    for label in numbers:
        if not _is_whole(label) or len(label) > 20 or not 0 <= int(label) < below:
            raise UserError(
                f"{labels[label]}: the label {label} is no class: classes are whole numbers from 0 "
                f"to {below - 1:,}{'' if names is None else f', the places in {key}'}"
            )
    return {label: int(label) for label in numbers}, None if names is None else tuple(names)


def listed(names: Iterable[str]) -> str:
    """The first names in quotation marks, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(map(repr, names[:_NAMED])) + more


def _is_whole(text: str) -> bool:
    found = _NUMBER.fullmatch(text)
    return found is not None and not (found[1] or "").strip(".0")


def same_numbers(names: Sequence[str] | None, others: Sequence[str] | None) -> bool:
    """Whether a number means the same class in two lists of names, None where they are not known.

    Lists that somebody wrote may call a class "tench" and "n01440764": they agree if they are of
    one length and what is in both has one place. `WordClasses` agree with equal ones alone.
    """
    if names == others:
        return True
    if isinstance(names, WordClasses) or isinstance(others, WordClasses):
        return False
    if names is None or others is None:
        return True
    places = {name: number for number, name in enumerate(others)}
    agree = all(places.get(name, number) == number for number, name in enumerate(names))
    return agree and len(names) == len(others)

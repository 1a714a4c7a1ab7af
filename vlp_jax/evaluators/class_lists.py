"""Numbers and names of classes in data, prompts and models; templates of prompts."""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from vlp_jax.data.pipeline import EvalPipeline, split_mixture
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.sources.labels import WordClasses, listed, same_numbers
from vlp_jax.data.sources.shards import SUFFIX
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators.base import NUMBER, Resources
from vlp_jax.files import read_lines

_log = logging.getLogger("vlp_jax.evaluators")

# The place of the name: {}, or {c} as in CLIP_benchmark's zeroshot_classification_templates.txt.
PLACE = re.compile(r"\{c?\}")


def lines(value: Sequence[str] | str, key: str) -> tuple[str, ...]:
    """Returns `value`, or the lines of the file it names; UserError if they cannot be read."""
    return read_lines(value, key) if isinstance(value, str) else tuple(value)


def check_templates(templates: Sequence[str]) -> tuple[str, ...]:
    """Returns `templates`; raises UserError if one has no place for the name, or there are none."""
    bad = [t for t in templates if not PLACE.search(t)]
    if bad or not templates:
        raise UserError(f"zero-shot templates need {{}} for the class; got {bad or 'none'}")
    return tuple(templates)


def fill(template: str, name: str) -> str:
    """Puts the name of a class into `template`; other braces in it stay as they are."""
    # A function, because re.sub would read a backslash in a name as a reference to a group.
    return PLACE.sub(lambda _: name, template)


def names_of_classes(
    given: Sequence[str] | str | None, known: Sequence[str] | None, field: str
) -> tuple[str, ...]:
    """Returns the names that a field numbers: `given` names, or lines of a file, or `known` ones.

    Raises:
      UserError: there are no names, or a name occurs twice. Two classes with one name have the same
        prompts, so no model can distinguish them.
    """
    names = lines(given or (), "class_names") or known
    if not names:
        raise UserError(f"the data has no names of the classes in {field!r}: set class_names")
    twice = [f"{name!r} ({count} times)" for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"class_names: {', '.join(twice)}: every class needs a name of its own, since classes "
            "of one name cannot be told apart"
        )
    return tuple(names)


def numbers_onto(
    names: Sequence[str] | None, classes: Sequence[str] | None, where: str, key: str
) -> Int[np.ndarray, " names"] | None:
    """Returns for each class of the data its number in another list; None if the numbers agree.

    Args:
      names, classes: names of the data's classes and of the other list, by number; None if unknown.
      where, key: the names of the data and of the other list in errors.

    Raises:
      UserError: a class of the data is not in the other list.
    """
    if same_numbers(names, classes):
        return None
    _check_named(names, classes, where, key)
    places = _places(names, classes)
    lacking = [name for name in names if name not in places]
    if lacking:
        raise UserError(
            f"{key} lacks {listed(lacking)}, a class of {where} ({listed(names)}): {key} has "
            f"{listed(classes)}; use the same names in both, or set data.label_names to the words "
            f"of the data in the order of {key}"
        )
    return np.array([places[name] for name in names])


def joined_classes(
    train: Sequence[str] | None, test: Sequence[str] | None
) -> tuple[tuple[str, ...] | None, Int[np.ndarray, " test"] | None]:
    """Joins the classes of two splits: the training data's, then those that only the test data has.

    Returns:
      The names, None if neither split knows them; and for each class of the test data its number in
      the joined list, None if the numbers agree.

    Raises:
      UserError: the splits have no class in common.
    """
    if same_numbers(train, test):
        names = test if train is None else train
        return None if names is None else tuple(names), None
    _check_named(test, train, "data", "train_data")
    places = _places(test, train)
    lacking = [name for name in test if name not in places]
    if len(lacking) == len(test):
        raise UserError(
            f"train_data and data have no class in common: {listed(train)}, and {listed(test)}"
        )
    if lacking:
        _log.warning(
            "train_data lacks %d of the %d classes of data, which count as wrong: %s",
            *(len(lacking), len(test), listed(lacking)),
        )
    places |= {name: len(train) + number for number, name in enumerate(lacking)}
    return (*train, *lacking), np.array([places[name] for name in test])


def renumber(
    labels: Int[np.ndarray, "*n"], numbers: Int[np.ndarray, " names"] | None
) -> Int[np.ndarray, "*n"]:
    """Maps labels by the table `numbers`. Labels out of range stay, to be refused later."""
    if numbers is None:
        return labels
    known = (labels >= 0) & (labels < len(numbers))
    # The inner `where` keeps labels out of range from indexing the table.
    return np.where(known, numbers[np.where(known, labels, 0)], labels).astype(labels.dtype)


def _places(names: Sequence[str], classes: Sequence[str]) -> dict[str, int]:
    """Returns the number in `classes` of each of `names` that occurs there.

    "red_card" matches "Red card", unless several names or classes are alike in this sense.
    """
    exact = {name: number for number, name in enumerate(classes)}
    spelled = Counter(map(_folded, classes)), Counter(map(_folded, names))
    alike = {_folded(name): number for number, name in enumerate(classes)}
    places = {}
    for name in names:
        folded = _folded(name)
        if name in exact:
            places[name] = exact[name]
        elif all(count[folded] == 1 for count in spelled):
            places[name] = alike[folded]
    return places


def _folded(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold().strip()))


def _check_named(
    names: Sequence[str] | None, classes: Sequence[str] | None, where: str, key: str
) -> None:
    """Raises UserError if one side has words for classes and the other numbers alone."""
    if names is None or classes is None:
        words, numbers = (key, where) if names is None else (where, key)
        some = listed(classes if names is None else names)
        raise UserError(
            f"the classes of {words} are words ({some}), and those of {numbers} are numbers: set "
            f"data.label_names, the list of all classes in the order of the numbers"
        )


def numbered(batches: Iterable[Mapping[str, np.ndarray]]) -> Iterable[dict[str, np.ndarray]]:
    """Adds the field `NUMBER` to each batch: the number of each example in the split, int32."""
    for step, batch in enumerate(batches):
        local = len(batch["mask"])
        whole = local * jax.process_count()
        # A global batch holds the examples of process 0, then of process 1, and so on.
        first = step * whole + jax.process_index() * local
        yield {**batch, NUMBER: np.arange(first, first + local, dtype=np.int32)}


def check_labels(labels: Int[np.ndarray, " n"], classes: int, field: str) -> None:
    """Raises NoScores if the model has no score for a label."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise NoScores(
            f"the labels in {field!r} go from {labels.min()} to {labels.max()}, and the model "
            f"scores {classes} classes: set the objective's number of them, or other data"
        )


def numbers_of_model(
    resources: Resources, data: Mapping[str, Any], pipeline: EvalPipeline, field: str
) -> Int[np.ndarray, " names"] | None:
    """Returns for each class of the data its number in the training data; None if they agree.

    They can differ only for a folder, and for data prepared from a folder: such data numbers the
    label words that occur in it. Raises UserError if the training data lacks a class.
    """
    if resources.train_data is None:
        return None
    parts = split_mixture(as_plain(resources.train_data))[0].values()
    named = pipeline.class_names(field)
    if not isinstance(named, WordClasses) and not any(map(_may_hold_words, parts)):
        return None
    asked = ("source", "path", "captions", "fields", "label_field", "label_names")
    if any(all(part.get(key) == data.get(key) for key in asked) for part in parts):
        return None  # the same files have the same classes, so they need not be read
    try:
        trained = [build_source(part).class_names(field) for part in parts]
    except UserError as error:
        _log.warning(
            "the training data cannot be opened (%s), so the classes of %r are taken to have the "
            "numbers that they had in training; else set data.label_names",
            *(error, field),
        )
        return None
    where = f"{field!r} in the evaluator's data"
    return numbers_onto(named, trained[0], where, "the training data")


def _may_hold_words(data: Mapping[str, Any]) -> bool:
    """Whether labels may be words: in a folder, and in data prepared from a folder."""
    return data.get("source") == "folder" or str(data.get("path")).endswith(SUFFIX)


def check_field(pipeline: EvalPipeline, field: str, where: str) -> None:
    """Raises UserError if batches have no field `field` of whole numbers."""
    spec = pipeline.batch_spec()
    if field not in spec or not np.issubdtype(spec[field][1], np.integer):
        raise UserError(
            f"{where}: the data has no whole numbers {field!r} after its preprocess (it has: "
            f"{', '.join(sorted(spec))})"
        )

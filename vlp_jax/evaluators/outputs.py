"""Numbers the examples of a split, and checks their labels against the model's classes."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from vlp_jax.data.pipeline import EvalPipeline, split_mixture
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.sources.labels import WordClasses
from vlp_jax.data.sources.manifest import SUFFIX
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators.base import NUMBER, Resources
from vlp_jax.evaluators.class_lists import numbers_onto

_log = logging.getLogger("vlp_jax.evaluators")


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

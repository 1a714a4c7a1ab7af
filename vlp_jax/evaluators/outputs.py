"""Applies a function of several fields to a split, and gathers the outputs on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Int

from vlp_jax.data.pipeline import EvalPipeline, split_mixture
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.sources.labels import WordClasses
from vlp_jax.data.sources.shards import SUFFIX
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators.base import Resources, chosen
from vlp_jax.evaluators.class_lists import numbers_onto
from vlp_jax.parallel.batch import put_batch

_log = logging.getLogger("vlp_jax.evaluators")
# Changes a batch on the devices before the function gets it, such as a corruption.
Change = Callable[[dict[str, Array]], dict[str, Array]]


def outputs_of(
    resources: Resources,
    params: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    function: str,
    inputs: Sequence[str],
    keep: Sequence[str] = (),
    change: Change = dict,
    more: Mapping[str, Any] | None = None,
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Returns the outputs of `function(params, {name: array})` on all batches, and `keep`'s fields.

    Both are without padding. Every process gets the rows of all processes, in the same order.

    Args:
      inputs: the fields that the function takes; it takes a single one as a bare array.
      keep: further fields to return.
      change: see `Change`; it gets and returns the fields `inputs` and `keep`.
      more: further inputs of the function, the same for every batch.
    """
    outputs, fields = [], []
    for batch in batches:
        rest = change(put_batch(chosen(batch, (*inputs, *keep)), resources.mesh))
        taken = {name: rest.pop(name) for name in inputs}
        argument = {**taken, **(more or {})} if more or len(inputs) > 1 else taken[inputs[0]]
        # `rest` passes through the function, whose results every process can fetch whole.
        output, rest = jax.device_get(resources.functions[function](params, argument, rest))
        mask = rest.pop("mask")
        outputs.append(output[mask])
        fields.append({name: value[mask] for name, value in rest.items()})
    named = {name: np.concatenate([f[name] for f in fields]) for name in fields[0]}
    return np.concatenate(outputs), named


def numbered(
    batches: Iterable[Mapping[str, np.ndarray]], name: str = "number"
) -> Iterable[dict[str, np.ndarray]]:
    """Adds the field `name` to each batch: the number of each example in the split, int32."""
    for step, batch in enumerate(batches):
        local = len(batch["mask"])
        whole = local * jax.process_count()
        # A global batch holds the examples of process 0, then of process 1, and so on.
        first = step * whole + jax.process_index() * local
        yield {**batch, name: np.arange(first, first + local, dtype=np.int32)}


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
    label words that occur in it.

    Raises:
      UserError: the training data lacks a class of `data`.
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

"""What a function of several fields makes of a split, gathered on the host."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from vlp_jax.data.pipeline import EvalPipeline, split_mixture
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.sources.labels import WordClasses
from vlp_jax.data.sources.manifest import SUFFIX
from vlp_jax.errors import NoScores, UserError
from vlp_jax.evaluators.base import Resources, chosen
from vlp_jax.evaluators.class_lists import numbers_onto
from vlp_jax.parallel.batch import put_batch

_log = logging.getLogger("vlp_jax.evaluators")
# What is done to the arrays of a batch, already on the devices, before the function sees them.
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
    """The outputs of `function(params, {name: array})` on all batches, and the fields `keep`.

    Both are without padding, and every process gets those of all, in one order.

    Args:
      inputs: fields that the function takes; of a single one it takes the bare array.
      keep: further fields that are wanted; nothing else stays on the host.
      change: see `Change`; it gets and gives the fields of a batch that are taken or kept.
      more: what the function takes besides, the same for every batch.
    """
    outputs, fields = [], []
    for batch in batches:
        rest = change(put_batch(chosen(batch, (*inputs, *keep)), resources.mesh))
        taken = {name: rest.pop(name) for name in inputs}
        argument = {**taken, **(more or {})} if more or len(inputs) > 1 else taken[inputs[0]]
        made, rest = jax.device_get(resources.functions[function](params, argument, rest))
        sound = rest.pop("mask")
        outputs.append(made[sound])
        fields.append({name: value[sound] for name, value in rest.items()})
    named = {name: np.concatenate([f[name] for f in fields]) for name in fields[0]}
    return np.concatenate(outputs), named


def numbered(
    batches: Iterable[Mapping[str, np.ndarray]], name: str = "number"
) -> Iterable[dict[str, np.ndarray]]:
    """The batches with the number of each example in the whole split, int32, as field `name`."""
    for step, batch in enumerate(batches):
        local = len(batch["mask"])
        whole = local * jax.process_count()
        first = step * whole + jax.process_index() * local
        yield {**batch, name: np.arange(first, first + local, dtype=np.int32)}


def ranks(
    scores: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """How many classes stand before the right one, 0 if none.

    Ties count against the model, so that equal scores for all classes are no success; so does a
    score that is no number.
    """
    own = np.take_along_axis(scores, labels[:, None].astype(int), axis=1)
    return (~(scores < own)).sum(axis=1) - 1


def check_labels(labels: Int[np.ndarray, " n"], classes: int, field: str) -> None:
    """Raises NoScores for a label without a score."""
    if labels.size and not 0 <= labels.min() <= labels.max() < classes:
        raise NoScores(
            f"the labels in {field!r} go from {labels.min()} to {labels.max()}, and the model "
            f"scores {classes} classes: set the objective's number of them, or other data"
        )


def numbers_of_model(
    resources: Resources, data: Mapping[str, Any], pipeline: EvalPipeline, field: str
) -> Int[np.ndarray, " names"] | None:
    """For each class of the data its number in the training data; None if they are the same.

    Only a folder, and what was prepared from one, may have numbers that depend on the words in it.

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
        return None  # the same list, which need not be read again
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
    """Whether the labels of some data may be words: it is a folder, or was prepared from one."""
    return data.get("source") == "folder" or str(data.get("path")).endswith(SUFFIX)


def check_field(pipeline: EvalPipeline, field: str, where: str) -> None:
    """Raises UserError if batches have no such field of whole numbers."""
    spec = pipeline.batch_spec()
    if field not in spec or not np.issubdtype(spec[field][1], np.integer):
        raise UserError(
            f"{where}: the data has no whole numbers {field!r} after its preprocess (it has: "
            f"{', '.join(sorted(spec))})"
        )

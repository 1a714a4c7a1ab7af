"""A split of a dataset for evaluators: embeddings and labels, shared through the cache."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import NoScores, NotFinite, UserError
from vlp_jax.evaluators.base import INDEX, Resources
from vlp_jax.evaluators.cache import key_of
from vlp_jax.evaluators.text_identity import TEXT_HASH, same_for_same_text, with_text_hashes


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """Outputs and fields of a whole split, in the order of its source, on every process.

    Attributes:
      outputs: field -> the output of its function, float32 [n, ...].
      fields: fields with one number for each example, and the arrays among `extra_fields`.
      index: int64 [n], the position of each example in the data.
    """

    outputs: Mapping[str, Float[np.ndarray, "n dim"]]
    fields: Mapping[str, np.ndarray]
    index: Int[np.ndarray, " n"]


class Split:
    """The examples of `data`, each once, and the outputs of functions on them.

    Within `Resources.one_evaluation`, splits of the same data share their outputs.

    Args:
      extra_fields: see `EvalPipeline`; arrays among them become `Embedded.fields`.
    """

    def __init__(
        self, resources: Resources, data: Mapping[str, Any], extra_fields: Sequence[str] = ()
    ) -> None:
        self.resources, self.data = resources, data
        self.pipeline = resources.pipeline(data, extra_fields)
        self.key = key_of(data)
        # Fields with one number per example cost little, and another evaluator may need them.
        # Arrays, such as a second image, are kept only if they were asked for.
        spec = self.pipeline.batch_spec()
        self._numbers = [
            name
            for name, (shape, _) in spec.items()
            if (len(shape) == 1 or name in extra_fields) and name not in ("image", "text", "mask")
        ]

    def embed(self, params: Any, functions: Mapping[str, str]) -> Embedded:
        """Applies functions to fields of all examples.

        Args:
          functions: field -> the name of the function to apply to it.

        Raises:
          NotFinite: an output is NaN or infinite.
        """
        cache = self.resources.cache
        keys = {field: (self.key, field, name) for field, name in functions.items()}
        outputs = {field: cache.get(params, key) for field, key in keys.items()}
        needed = {field: name for field, name in functions.items() if outputs[field] is None}
        names = (*self._numbers, INDEX)
        fields = {name: cache.get(params, (self.key, name)) for name in names}
        if needed or any(value is None for value in fields.values()):
            # If only fields are missing, a pass over the data must still compute something.
            needed = needed or dict(functions)
            batches = self.pipeline.batches()
            batches = with_text_hashes(batches) if "text" in needed else batches
            keep = (*self._numbers, *([TEXT_HASH] if "text" in needed else []))
            new, fields = self.resources.embed(params, batches, needed, keep)
            if "text" in new:  # else the same caption could have two slightly different vectors
                new["text"] = same_for_same_text(new["text"], fields.pop(TEXT_HASH))
            for field, array in new.items():
                self._check_finite(array, needed[field])
                cache.put(params, keys[field], array)
            for name, array in fields.items():
                cache.put(params, (self.key, name), array)
            outputs |= new
        index = fields.pop(INDEX)
        return Embedded(outputs, fields, index)

    def _check_finite(self, array: np.ndarray, function: str) -> None:
        bad = (~np.isfinite(array.reshape(len(array), -1))).any(axis=1).sum()
        if bad:
            raise NotFinite(
                f"{function} gives no finite numbers for {bad} of {len(array)} examples"
            )

    def labels(self, embedded: Embedded, field: str, classes: int | None) -> Int[np.ndarray, " n"]:
        """Returns the labels in `field`, int64 [n].

        Args:
          classes: the number of classes; None if unknown.

        Raises:
          UserError: `field` does not hold one whole number for each example.
          NoScores: a label is below 0, or not below `classes`.
        """
        if field not in embedded.fields:
            known = ", ".join(sorted(embedded.fields)) or "none"
            raise UserError(
                f"label_field: the examples have no number {field!r} (they have: {known})"
            )
        labels = embedded.fields[field]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            shape = list(labels.shape[1:])
            raise UserError(f"label_field: {field!r} is {labels.dtype}{shape}, not a whole number")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            top = "" if classes is None else f", and class_names has {classes}"
            raise NoScores(f"label_field: {field!r} goes from {low} to {high}{top}")
        return labels.astype(np.int64)

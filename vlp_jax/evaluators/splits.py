"""A split of a dataset as its evaluators want it: embeddings, labels and lists of captions."""

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
    """A whole split, in the order of its source, on every process.

    Attributes:
      outputs: by field what a function made of it, float32 [n, ...].
      fields: a number of each example, [n], and the arrays that the split was asked for.
      index: int64 [n], the place of each example in the data.
    """

    outputs: Mapping[str, Float[np.ndarray, "n dim"]]
    fields: Mapping[str, np.ndarray]
    index: Int[np.ndarray, " n"]


class Split:
    """The examples of `data`, each once, and what functions make of them.

    Within `Resources.one_evaluation` what another split of the same data has computed is not
    computed again.

    Args:
      extra_fields: see `EvalPipeline`; arrays among them are in `Embedded.fields`.
    """

    def __init__(
        self, resources: Resources, data: Mapping[str, Any], extra_fields: Sequence[str] = ()
    ) -> None:
        self.resources, self.data = resources, data
        self.pipeline = resources.pipeline(data, extra_fields)
        self.key = key_of(data)
        # A number of each example costs little, and another evaluator may ask for it. Arrays, such
        # as a second image, are kept for those who ask.
        spec = self.pipeline.batch_spec()
        self._numbers = [
            name
            for name, (shape, _) in spec.items()
            if (len(shape) == 1 or name in extra_fields) and name not in ("image", "text", "mask")
        ]

    def embed(self, params: Any, functions: Mapping[str, str]) -> Embedded:
        """What `functions` (field -> name of a function) make of their fields.

        Raises:
          NotFinite: some of it is no number.
        """
        cache = self.resources.cache
        keys = {field: (self.key, field, name) for field, name in functions.items()}
        outputs = {field: cache.get(params, key) for field, key in keys.items()}
        needed = {field: name for field, name in functions.items() if outputs[field] is None}
        names = (*self._numbers, INDEX)
        fields = {name: cache.get(params, (self.key, name)) for name in names}
        if needed or any(value is None for value in fields.values()):
            needed = needed or dict(functions)
            batches = self.pipeline.batches()
            batches = with_text_hashes(batches) if "text" in needed else batches
            keep = (*self._numbers, *([TEXT_HASH] if "text" in needed else []))
            new, fields = self.resources.embed(params, batches, needed, keep)
            if "text" in new:
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

    def labels(self, found: Embedded, field: str, classes: int | None) -> Int[np.ndarray, " n"]:
        """The classes of `found`, int64 [n].

        Raises:
          UserError: `field` is no whole number per example.
          NoScores: one is not the number of one of `classes`.
        """
        if field not in found.fields:
            known = ", ".join(sorted(found.fields)) or "none"
            raise UserError(
                f"label_field: the examples have no number {field!r} (they have: {known})"
            )
        labels = found.fields[field]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            shape = list(labels.shape[1:])
            raise UserError(f"label_field: {field!r} is {labels.dtype}{shape}, not a whole number")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            top = "" if classes is None else f", and class_names has {classes}"
            raise NoScores(f"label_field: {field!r} goes from {low} to {high}{top}")
        return labels.astype(np.int64)

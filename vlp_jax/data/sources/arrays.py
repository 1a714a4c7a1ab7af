"""Arrays in memory: for library users, tests and benchmarks. Needs no TensorFlow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.sources.base import STRING, FieldSpec, Names, Source
from vlp_jax.errors import UserError


@dataclass(frozen=True, eq=False)
class ArraysSource(Source):
    """A dict of arrays with one leading dimension.

    Attributes:
      arrays: field name -> array or sequence [n, ...], for example
        {"image": uint8 [n, h, w, 3], "text": n strings or int32 [n, context_length]}.
      names: field name -> names of its classes, for fields that hold class numbers.

    Raises:
      UserError: for no arrays, arrays of different lengths, or an element type that is neither a
        number nor a string.
    """

    arrays: Mapping[str, Any]
    names: Mapping[str, Sequence[str]] | None = None

    def __post_init__(self) -> None:
        lengths = {name: len(values) for name, values in self._columns.items()}
        if not lengths or 0 in lengths.values():
            raise UserError(f"data.arrays holds no examples (lengths: {lengths})")
        if len(set(lengths.values())) > 1:
            raise UserError(f"data.arrays holds arrays of different lengths: {lengths}")

    @cached_property
    def _columns(self) -> dict[str, np.ndarray]:
        return {name: _as_column(name, values) for name, values in self.arrays.items()}

    @property
    def needs_tensorflow(self) -> bool:
        return False

    def __len__(self) -> int:
        return len(next(iter(self._columns.values())))

    def fields(self) -> dict[str, FieldSpec]:
        return {
            name: STRING if column.dtype == object else FieldSpec(column.shape[1:], column.dtype)
            for name, column in self._columns.items()
        }

    def record_fields(self) -> dict[str, FieldSpec]:
        return self.fields()

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        return {name: column[indices] for name, column in self._columns.items()}

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        return {name: record[name] for name in names}

    def column(self, name: str) -> np.ndarray:
        return self._columns[name]

    def class_names(self, field: str) -> tuple[str, ...] | None:
        names = (self.names or {}).get(field)
        return None if names is None else tuple(names)

    def describe(self, index: int) -> str:
        return f"data.arrays, example {index}"

    def fingerprint(self) -> str:
        return f"arrays:{len(self)}"


def _as_column(name: str, values: Any) -> np.ndarray:
    wrong = f"data.arrays[{name!r}] must be [examples, ...] numbers, or a list of strings"
    if len(values) and all(isinstance(value, str | bytes) for value in values):
        # Objects, because NumPy's own strings lose zero bytes at their end.
        column = np.empty(len(values), object)
        column[:] = [v.encode("utf-8", "replace") if isinstance(v, str) else v for v in values]
        return column
    try:
        array = np.asarray(values)  # lists of different lengths are a ValueError
    except ValueError:
        raise UserError(wrong) from None
    if array.ndim == 0 or array.dtype.kind not in "biuf":
        raise UserError(wrong)
    return array

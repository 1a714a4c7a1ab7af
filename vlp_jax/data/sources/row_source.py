"""Sources that read the fields of an example as Python values: folders, tars, Parquet files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.sources.base import STRING, STRINGS, FieldSpec, Names, Source

Rows = dict[str, list[Any]]

INT, FLOAT = FieldSpec((), np.dtype(np.int64)), FieldSpec((), np.dtype(np.float32))


class RowSource(Source):
    """A source whose records hold the fields themselves, lists of text padded to one length.

    A subclass says how values are read (`rows`). Preparation of data takes them as they are,
    training as the types in `fields` (`fetch`).
    """

    column_chunk: ClassVar[int] = 1024  # examples that `column` reads at a time

    def rows(self, indices: np.ndarray, names: Sequence[str]) -> tuple[Rows, np.ndarray]:
        """Reads the values of fields that `can_read`, for the examples at `indices`, int64 [n].

        Returns for each name a list of n values, None where there is none; and the faults, byte
        strings [n], empty where an example can be used.
        """
        ...

    def can_read(self, name: str) -> bool:
        """Whether `rows` knows the field `name`, of whatever type."""
        return name in self.fields()

    def is_text(self, name: str) -> bool:
        """Whether byte strings in the field `name` are text."""
        ...

    def place(self, index: int, name: str) -> tuple[str, int] | None:
        """The file and offset of a field's bytes; None if they cannot be read again singly."""
        return None

    def record_fields(self) -> dict[str, FieldSpec]:
        fields = self.fields()
        counts = {_count_of(name): INT for name, spec in fields.items() if spec.shape}
        return {**fields, **counts, faults.FAULT: STRING}

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        fields = self.fields()
        indices = np.asarray(indices, np.int64)
        rows, found = self.rows(indices, list(fields) if names is None else list(names))
        for name, values in rows.items():
            for number, value in enumerate(values):
                # A faulty example is dropped later; until then its values must fit the arrays.
                values[number] = fitting(value, fields[name])
                if values[number] is None and not found[number]:
                    detail = f"it has no {name!r} that can be read"
                    found[number] = faults.marked(faults.MISSING_FIELD, detail)
        return _pack(fields, rows, found)

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        fields = self.fields()
        return {
            name: record[name][: record[_count_of(name)]] if fields[name].shape else record[name]
            for name in names
        }

    def column(self, name: str) -> np.ndarray:
        parts = []
        for first in range(0, len(self), self.column_chunk):
            record = self.fetch(np.arange(first, min(first + self.column_chunk, len(self))), [name])
            parts.append(np.ma.masked_array(record[name], record[faults.FAULT] != b""))
        return np.ma.concatenate(parts)


def _pack(fields: Mapping[str, FieldSpec], rows: Rows, found: np.ndarray) -> dict[str, np.ndarray]:
    """Stacks the values of n examples, which fit `fields`, into arrays [n, ...]."""
    record: dict[str, np.ndarray] = {}
    for name, spec in fields.items():
        values = rows.get(name, [None] * len(found))
        if spec.shape:
            lists = [value or [] for value in values]
            # A record array needs one length; the count field says where padding begins.
            table = np.full((len(lists), max(map(len, lists), default=0)), b"", object)
            for row, texts in zip(table, lists, strict=True):
                row[: len(texts)] = texts
            record[name] = table
            record[_count_of(name)] = np.array([len(texts) for texts in lists], np.int64)
        else:
            nothing = b"" if spec.is_string else 0
            column = np.empty(len(found), spec.dtype)
            column[:] = [nothing if value is None else value for value in values]
            record[name] = column
    return {**record, faults.FAULT: found}


def fitting(value: Any, spec: FieldSpec) -> Any:
    """Converts `value` to what a field of `spec` holds; None if its type is another or too large.

    A single text fits a list of texts.
    """
    if spec.shape:
        items = value if isinstance(value, list) else [value]
        if value is None or (items is not value and not isinstance(value, str | bytes)):
            return None
        return [
            item if isinstance(item, bytes) else str(item).encode("utf-8", "replace")
            for item in items
            if item is not None
        ]
    if spec.is_string:
        if isinstance(value, str):
            return value.encode("utf-8", "replace")
        return value if isinstance(value, bytes) else None
    if not isinstance(value, bool | int | float):
        return None
    if spec.dtype.kind == "f":
        return float(value)
    whole = int(value) if value == value and abs(value) < 2**63 else None
    return whole if whole == value else None


def spec_of_all(values: Iterable[Any]) -> FieldSpec | None:
    """The type of a field with these values: the type of the first that is not null.

    Whole numbers and floats together are floats. Values of any other type will be faults of their
    examples.
    """
    found: FieldSpec | None = None
    for spec in filter(None, map(_spec_of, values)):
        if found in (None, INT):
            found = spec
    return found


def _spec_of(value: Any) -> FieldSpec | None:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return STRINGS
    return {bool: INT, int: INT, float: FLOAT, str: STRING}.get(type(value))


def _count_of(name: str) -> str:
    return f"{name}/count"

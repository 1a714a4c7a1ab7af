"""Records whose columns are the fields themselves; lists of text are padded, with their lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.sources.base import STRING, FieldSpec, Source

if TYPE_CHECKING:
    import tensorflow as tf

_COUNT = FieldSpec((), np.dtype(np.int64))


def record_fields(fields: Mapping[str, FieldSpec]) -> dict[str, FieldSpec]:
    """The fields of the records that `pack` makes."""
    counts = {_count_of(name): _COUNT for name, spec in fields.items() if spec.shape}
    return {**fields, **counts, faults.FAULT: STRING}


def pack(
    fields: Mapping[str, FieldSpec],
    rows: Mapping[str, Sequence[Any]],
    found: np.ndarray,
) -> dict[str, np.ndarray]:
    """Records of n examples.

    Args:
      fields: all fields of the source: scalars, and lists of text.
      rows: the values of some of them, n each; None where there is none.
      found: the faults, byte strings [n].
    """
    record: dict[str, np.ndarray] = {}
    for name, spec in fields.items():
        values = rows.get(name, [None] * len(found))
        if spec.shape:
            lists = [value or [] for value in values]
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


def parse(
    fields: Mapping[str, FieldSpec], record: Mapping[str, tf.Tensor], names: Sequence[str]
) -> dict[str, tf.Tensor]:
    """The fields `names` of one example from its record, in graph mode."""
    return {
        name: record[name][: record[_count_of(name)]] if fields[name].shape else record[name]
        for name in names
    }


def column(source: Source, name: str, ends: Sequence[int]) -> np.ndarray:
    """The field `name` of all examples, masked where it cannot be read; see `Source.column`.

    Args:
      ends: examples are read up to each of these, in turn.
    """
    parts = []
    for first, end in zip([0, *ends[:-1]], ends, strict=True):
        record = source.fetch(np.arange(first, end), [name])
        parts.append(np.ma.masked_array(record[name], record[faults.FAULT] != b""))
    return np.ma.concatenate(parts)


def fitting(value: Any, spec: FieldSpec) -> Any:
    """`value` as a field of `spec` holds it; None if it is of another type or too large.

    One text fits a list of texts.
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


def _count_of(name: str) -> str:
    return f"{name}/count"

"""Columns of Parquet files as fields of examples: their types, and what structs hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlp_jax.data.sources.base import STRING, STRINGS, FieldSpec
from vlp_jax.data.sources.row_source import FLOAT, INT

if TYPE_CHECKING:
    import pyarrow as pa


def columns_of(schema: pa.Schema) -> dict[str, pa.DataType]:
    """Type by name of all columns whose name occurs once, and of what structs hold, by dots."""
    found = {field.name: field.type for field in schema if schema.names.count(field.name) == 1}
    waiting = list(found.items())
    while waiting:
        name, kind = waiting.pop(0)
        if _is_struct(kind):
            inner = [(f"{name}.{field.name}", field.type) for field in kind]
            waiting += [pair for pair in inner if pair[0] not in found]
            found = {**dict(inner), **found}
    return found


def _path_of(name: str, schema: pa.Schema) -> tuple[int, list[str]]:
    """Finds the field `name`: its column's number, -1 for none, and the path within its struct."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        column = schema.get_field_index(".".join(parts[:count]))  # -1 for a name that occurs twice
        if column >= 0:
            return column, parts[count:]
    return -1, []


def column_read(name: str, schema: pa.Schema) -> str:
    """The name by which pyarrow reads no more of a struct than the field `name`."""
    column, path = _path_of(name, schema)
    kind = schema.field(column).type if column >= 0 else None
    for part in path:
        known = _is_struct(kind) and kind.get_field_index(part) >= 0
        kind = kind.field(part).type if known else None
    return f"{name}.bytes" if _has_bytes(kind) else name


def leaves(table: pa.Table, names: Sequence[str]) -> dict[str, pa.ChunkedArray]:
    """Takes the fields `names` of a table, as far as it has them, out of their structs.

    Text is not decoded here: that it is not UTF-8 is a fault of an example, not of a row group.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    found = {}
    for name in names:
        column, path = _path_of(name, table.schema)
        if column < 0:
            continue
        values = table.column(column)
        for part in path:
            if not _is_struct(values.type) or values.type.get_field_index(part) < 0:
                break
            values = pc.struct_field(values, part)
        else:
            if _has_bytes(values.type):
                values = pc.struct_field(values, "bytes")
            if _is(values.type, "dictionary"):
                values = values.cast(values.type.value_type)
            if _is_text(values.type):
                values = values.cast(pa.large_binary())
            elif _is_list(values.type) and _is_text(values.type.value_type):
                values = values.cast(pa.large_list(pa.large_binary()))
            found[name] = values
    return found


def why_not(name: str, kind: pa.DataType | None, schema: pa.Schema, path: str) -> str:
    """Why the column `name` of a file is no field; "" if there is no such column."""
    import pyarrow as pa

    top = next((n for n in (name, name.split(".")[0]) if schema.names.count(n) > 1), None)
    if top is not None:
        return f"{schema.names.count(top)} columns of {path} are named {top!r}: rename all but one"
    if kind is None:
        return ""
    if kind == pa.null():
        return f"column {name!r} of {path} holds no value"
    if _is_struct(kind):
        inner = ", ".join(f"{name}.{field.name}" for field in kind)
        return f"column {name!r} of {path} is {kind}: name a part of it ({inner})"
    return (
        f"column {name!r} of {path} is {kind}, a type that is not read: write it as string, "
        "binary, int64, float, list<string> or a struct of them"
    )


def _is_struct(kind: pa.DataType | None) -> bool:
    return kind is not None and _is(kind, "struct")


def _has_bytes(kind: pa.DataType | None) -> bool:
    """Whether the type is an image as `datasets` writes it: a struct with the file's bytes."""
    return _is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is(kind: pa.DataType, *names: str) -> bool:
    """Whether one of pyarrow's tests, such as "string" for `types.is_string`, fits a type."""
    from pyarrow import types

    return any(getattr(types, f"is_{name}")(kind) for name in names)


def _is_text(kind: pa.DataType) -> bool:
    return _is(kind, "string", "large_string", "string_view")


def _is_bytes(kind: pa.DataType) -> bool:
    fixed = _is(kind, "fixed_size_binary") and not _is(kind, "decimal")
    return fixed or _is(kind, "binary", "large_binary", "binary_view")


def _is_list(kind: pa.DataType) -> bool:
    return _is(kind, "list", "large_list", "fixed_size_list", "list_view", "large_list_view")


def is_text(kind: pa.DataType) -> bool:
    """Whether a column holds text, or lists of it."""
    inner = kind.value_type if _is(kind, "dictionary") or _is_list(kind) else kind
    return _is_text(inner)


def spec_of(kind: pa.DataType) -> FieldSpec | None:
    """The field type for a column type; None for a type that is not read."""
    if _is(kind, "dictionary"):
        kind = kind.value_type
    if _is_text(kind) or _is_bytes(kind) or _has_bytes(kind):
        return STRING
    if _is(kind, "integer", "boolean"):
        return INT
    if _is(kind, "floating"):
        return FLOAT
    if _is_list(kind) and (_is_text(kind.value_type) or _is_bytes(kind.value_type)):
        return STRINGS
    return None

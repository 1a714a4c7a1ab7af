"""Parquet files with the bytes of images in them, as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.files import retrying
from vlp_jax.data.sources.base import Blocks, FieldSpec
from vlp_jax.data.sources.parquet_columns import column_read, columns_of, leaves, spec_of, why_not
from vlp_jax.data.sources.parquet_columns import is_text as is_text_type
from vlp_jax.data.sources.records import empty_strings
from vlp_jax.data.sources.row_source import Rows, RowSource
from vlp_jax.data.sources.shards import (
    TRUNCATED,
    Index,
    ShardedSource,
    Shards,
    find_pieces,
    group_by_piece,
)
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MIB = 2**20
_LOOKED_AT = 20  # files whose row groups are taken for typical
WINDOW = 1  # row groups that are open at a time in a lane


@dataclass(frozen=True)
class ParquetSource(ShardedSource, RowSource):
    """Rows of Parquet files.

    The fields are the columns under their own names: text, whole numbers, floats, bytes, lists of
    text, and images, which are bytes or a struct with `bytes` in it. What a struct holds is named
    by dots ("meta.caption"). Columns of other types, and those whose name occurs twice, are left
    out.

    A row group is read whole and kept until the memory of `cache_mib` is needed for others. A run
    reads `data.lanes` row groups of each `data.window` at a time.

    Attributes:
      path: files, patterns with "*" and brace ranges, a folder, on disk or scheme://.
      cache_mib: memory for row groups.
      cache_dir: where copies of remote files are kept; None: ~/.cache/vlp_jax/data.
      cache_gib: room for the copies.

    Raises:
      UserError: for files that are not there, or hold no row.
    """

    path: str | Sequence[str]
    cache_mib: int = 1024
    cache_dir: str | None = None
    cache_gib: float = 64.0

    def __post_init__(self) -> None:
        if self.cache_mib < 1:
            raise UserError(f"data.cache_mib={self.cache_mib} must be at least 1")

    @cached_property
    def shards(self) -> Shards:
        pieces, _ = find_pieces(self.path, ".parquet", "parquet")
        return Shards(pieces, "parquet", index_parquet, self.cache_dir, self.cache_gib)

    @cached_property
    def _groups(self) -> _RowGroups:
        return _RowGroups(self.cache_mib * MIB)

    @cached_property
    def _schema(self) -> pa.Schema:
        """The first file's schema; a column that is null there has its type in other files."""
        import pyarrow as pa

        pieces = range(len(self.shards.pieces))
        schema = next(schema for schema, _ in self._schemas(pieces))
        for number, field in enumerate(schema):
            if pa.types.is_null(field.type):
                others = self._schemas(self.shards.near(_LOOKED_AT))
                found = (columns_of(other).get(field.name, field.type) for other, _ in others)
                kind = next((kind for kind in found if kind != field.type), field.type)
                schema = schema.set(number, field.with_type(kind))
        return schema

    def _schemas(self, pieces: Iterable[int]) -> Iterator[tuple[pa.Schema, str]]:
        """The schema and the path of each file that can be read."""
        import pyarrow.parquet as pq

        for piece in pieces:
            if not self.shards.index(piece)["fault"].any():
                yield pq.read_schema(self.shards.local(piece)), self.shards.pieces[piece].path

    @cached_property
    def _fields(self) -> dict[str, FieldSpec]:
        """The columns of the first file; `look_for` adds other files' and parts of structs."""
        kinds = columns_of(self._schema)
        found = {name: spec_of(kinds[name]) for name in self._schema.names if name in kinds}
        fields = {name: spec for name, spec in found.items() if spec is not None}
        if not fields:
            raise UserError(f"data.path={self.path!r}: no column has a type that can be used")
        return fields

    def look_for(self, name: str) -> str:
        if name in self._fields:
            return ""
        why = ""
        for schema, path in self._schemas(self.shards.near(_LOOKED_AT)):
            kind = columns_of(schema).get(name)
            spec = None if kind is None else spec_of(kind)
            if spec is not None:
                self._fields[name] = spec
                return ""
            why = why or why_not(name, kind, schema, path)
        return why

    def fields(self) -> dict[str, FieldSpec]:
        return self._fields

    def rows(self, indices: np.ndarray, names: Sequence[str]) -> tuple[Rows, np.ndarray]:
        rows: Rows = {name: [None] * len(indices) for name in names}
        found = empty_strings(len(indices))
        pieces, places = self.shards.locate(indices)
        for piece, chosen in group_by_piece(pieces):
            index = self.shards.index(piece)
            if index["fault"].any():
                found[chosen] = self.shards.fault(piece, 0)
                continue
            groups = np.searchsorted(index["group_end"], places[chosen], side="right")
            for group, inside in group_by_piece(groups):
                numbers = chosen[inside]
                first = index["group_end"][group] - index["group_size"][group]
                self._read_group(piece, group, places[numbers] - first, numbers, rows, found)
        return rows, found

    def can_read(self, name: str) -> bool:
        return name in columns_of(self._schema)

    def is_text(self, name: str) -> bool:
        return is_text_type(columns_of(self._schema)[name])

    def _read_group(
        self,
        piece: int,
        group: int,
        places: np.ndarray,
        numbers: np.ndarray,
        rows: Rows,
        found: np.ndarray,
    ) -> None:
        """Puts the rows at `places` of a row group at `numbers` of `rows`, or says why not."""
        import pyarrow as pa

        path = self.shards.pieces[piece].path
        wanted = tuple(sorted(rows))

        def read() -> pa.Table:
            import pyarrow.parquet as pq

            try:
                with pq.ParquetFile(self.shards.local(piece)) as file:
                    needed = [column_read(name, file.schema_arrow) for name in wanted]
                    table = file.read_row_group(group, columns=needed)
                return pa.table(leaves(table, wanted))
            except OSError as error:
                if error.errno is None:  # Arrow's own, of bytes that make no sense
                    raise pa.ArrowInvalid(str(error)) from error
                raise

        try:
            table = self._groups.get((path, group, wanted), lambda: retrying(path, read))
        except pa.ArrowException as error:
            detail = f"row group {group}: {(str(error).splitlines() or ['it cannot be read'])[0]}"
            found[numbers] = faults.marked(faults.UNREADABLE, detail)
            return
        for name, values in rows.items():
            if name not in table.column_names:
                detail = f"the file has no column {name!r}, or two of that name"
                found[numbers] = faults.marked(faults.MISSING_FIELD, detail)
                continue
            column = table.column(name)
            for number, place in zip(numbers.tolist(), places.tolist(), strict=True):
                values[number] = column[place].as_py()

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """The names that `datasets` notes in the schema for a ClassLabel."""
        import json

        note = (self._schema.metadata or {}).get(b"huggingface")
        features = json.loads(note)["info"]["features"] if note else {}
        names = features.get(field, {}).get("names")
        return tuple(names) if names else None

    def describe(self, index: int) -> str:
        return self.shards.describe(index).replace("record", "row", 1)

    def blocks(self) -> Blocks | None:
        return self._blocks

    @cached_property
    def _blocks(self) -> Blocks:
        sizes = [
            np.array([piece.count], np.int64)
            if self.shards.index(number)["fault"].any() or not self.shards.in_place
            else self.shards.index(number)["group_size"]
            for number, piece in enumerate(self.shards.pieces)
        ]
        # For the warning about memory; the first files stand for all.
        largest = max(
            int(self.shards.index(number)["group_bytes"].max(initial=0))
            for number in range(min(_LOOKED_AT, len(self.shards.pieces)))
        )
        joined = np.concatenate(sizes)
        return Blocks(joined[joined > 0], WINDOW, largest, self.cache_mib * MIB)


class _RowGroups:
    """The row groups that were read last, up to a number of bytes.

    Threads that ask for one while another reads it wait for the result.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._lock = threading.Lock()
        self._tables: OrderedDict[Any, Any] = OrderedDict()
        self._reading: dict[Any, threading.Lock] = {}

    def get(self, key: Any, read: Callable[[], Any]) -> Any:
        with self._lock:
            if key in self._tables:
                self._tables.move_to_end(key)
                return self._tables[key]
            reading = self._reading.setdefault(key, threading.Lock())
        with reading:
            with self._lock:
                if key in self._tables:
                    return self._tables[key]
            # Outside of `_lock`, so that other row groups can be had meanwhile.
            table = read()
            with self._lock:
                self._tables[key] = table
                self._reading.pop(key, None)
                tables = self._tables
                while len(tables) > 1 and sum(t.nbytes for t in tables.values()) > self._capacity:
                    self._tables.popitem(last=False)
        return table


def index_parquet(path: str) -> Index:
    """Finds the row groups of a Parquet file.

    Returns:
      group_size, group_end and group_bytes (int64 [groups]) and fault (uint8 [rows]); a file whose
      end, where its index is, cannot be read counts as one damaged row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        about = pq.read_metadata(path)
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None) is not None:
            raise
        about = None
    groups = [] if about is None else [about.row_group(n) for n in range(about.num_row_groups)]
    sizes = np.array([group.num_rows for group in groups], np.int64)
    fault = np.array([TRUNCATED]) if about is None else np.zeros(about.num_rows)
    return {
        "group_size": sizes,
        "group_bytes": np.array([group.total_byte_size for group in groups], np.int64),
        "group_end": np.cumsum(sizes),
        "fault": fault.astype(np.uint8),
    }

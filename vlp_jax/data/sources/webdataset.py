"""WebDataset tar shards, as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json a sample."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.sources import columns, manifest
from vlp_jax.data.sources.base import STRING, STRINGS, Blocks, FieldSpec, Source
from vlp_jax.data.sources.manifest import find_pieces
from vlp_jax.data.sources.records import empty_strings, file_fault
from vlp_jax.data.sources.shards import TRUNCATED, Shards, group_by_piece
from vlp_jax.data.sources.tar_index import index_tar
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
BLOCK, WINDOW = 256, 4  # samples of one shard that are read together, and such blocks at a time
_LOOKED_AT = 20  # samples that are looked at to see which fields there are
_COLUMN_CHUNK = 1024
_INT = FieldSpec((), np.dtype(np.int64))
_FLOAT = FieldSpec((), np.dtype(np.float32))


@dataclass(frozen=True)
class WebDatasetSource(Source):
    """Samples of tar shards, compressed or not.

    The fields are `image` (the file with any extension of an image), `text` (KEY.txt), `id` (KEY),
    each extension by itself ("jpg", "json"; "cls" is a whole number), and what KEY.json holds
    ("json.caption", "json.width"): text, numbers and lists of text.

    Attributes:
      path: files, patterns with "*" and brace ranges, a folder, on disk or scheme://; or the
        manifest of prepared data.
      cache_dir: where indexes and copies of remote files are kept; None: ~/.cache/vlp_jax/data.
      cache_gib: room for the copies.

    Raises:
      UserError: for files that are not there, or hold no sample.
    """

    path: str | Sequence[str]
    cache_dir: str | None = None
    cache_gib: float = 64.0

    def __post_init__(self) -> None:
        _ = self._fields

    @cached_property
    def _shards(self) -> Shards:
        pieces, _ = find_pieces(self.path, ".tar", "webdataset")
        return Shards(pieces, "tar", index_tar, self.cache_dir, self.cache_gib)

    @cached_property
    def _fields(self) -> dict[str, FieldSpec]:
        """What the first samples hold."""
        extensions: set[str] = set()
        documents: list[Any] = []
        for piece, row in self._first_samples():
            index = self._shards.index(piece)
            present = index["extension"][index["size"][row] >= 0].tolist()
            extensions.update(present)
            if "json" in present:
                documents.append(_parsed_json(self._content(piece, row, "json")))
        if not extensions:
            raise UserError(f"data.path={self.path!r}: all samples are damaged")
        fields = {"image": STRING} if extensions & set(IMAGE_EXTENSIONS) else {}
        fields |= {"text": STRING} if "txt" in extensions else {}
        fields["id"] = STRING
        fields |= {name: _INT if name == "cls" else STRING for name in sorted(extensions)}
        for document in documents:
            for name, value in (document or {}).items():
                spec = _spec_of(value)
                # A number that is whole here and there is a float.
                if spec is not None and fields.get(f"json.{name}") in (None, _INT):
                    fields[f"json.{name}"] = spec
        return fields

    def _first_samples(self) -> list[tuple[int, int]]:
        """(piece, row) of some sound samples, of the first shard that has any."""
        for piece, shard in enumerate(self._shards.pieces):
            rows = range(shard.skip, shard.skip + min(shard.count, _LOOKED_AT))
            sound = np.flatnonzero(self._shards.index(piece)["fault"] == 0)
            found = [(piece, row) for row in rows if row in sound]
            if found:
                return found
        return []

    def __len__(self) -> int:
        return len(self._shards)

    def fields(self) -> dict[str, FieldSpec]:
        return self._fields

    def record_fields(self) -> dict[str, FieldSpec]:
        return columns.record_fields(self._fields)

    def fetch(
        self, indices: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        indices = np.asarray(indices, np.int64)
        wanted = list(self._fields) if names is None else list(names)
        rows: dict[str, list[Any]] = {name: [None] * len(indices) for name in wanted}
        found = empty_strings(len(indices))
        pieces, places = self._shards.locate(indices)
        for piece, chosen in group_by_piece(pieces):
            for number in chosen.tolist():
                found[number] = self._sample(piece, int(places[number]), number, rows)
        return columns.pack(self._fields, rows, found)

    def _sample(self, piece: int, row: int, number: int, rows: dict[str, list[Any]]) -> bytes:
        """Puts the fields of a sample into `rows`; returns its fault."""
        index = self._shards.index(piece)
        if row >= len(index["fault"]) or index["fault"][row]:
            beyond = row >= len(index["fault"])
            return file_fault(TRUNCATED if beyond else index["fault"][row])
        document: Any = _UNREAD
        for name, column in rows.items():
            if name == "id":
                column[number] = bytes(index["key"][row])
                continue
            extension, _, key = name.partition("json.")
            raw = self._content(piece, row, "json" if key else extension)
            if raw is None:
                return faults.marked(faults.MISSING_FIELD, f"it has no {name!r}")
            if not key:
                column[number] = raw if name != "cls" else _whole_number(raw)
            else:
                document = _parsed_json(raw) if document is _UNREAD else document
                column[number] = columns.fitting((document or {}).get(key), self._fields[name])
            if column[number] is None:
                return faults.marked(faults.MISSING_FIELD, f"it has no {name!r} that can be read")
        return b""

    def _content(self, piece: int, row: int, name: str) -> bytes | None:
        """The bytes of a sample's file `name`, an extension, `image` or `text`."""
        index = self._shards.index(piece)
        candidates = {"image": IMAGE_EXTENSIONS, "text": ("txt",)}.get(name, (name,))
        for candidate in candidates:
            for column in np.flatnonzero(index["extension"] == candidate):
                size = int(index["size"][row, column])
                if size >= 0:
                    return self._shards.read(piece, int(index["offset"][row, column]), size)
        return None

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        return columns.parse(self._fields, record, names)

    def column(self, name: str) -> np.ndarray:
        ends = [*range(_COLUMN_CHUNK, len(self), _COLUMN_CHUNK), len(self)]
        return columns.column(self, name, ends)

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return manifest.class_names(self.path, field.removeprefix("json."))

    def describe(self, index: int) -> str:
        piece, row = (int(x[0]) for x in self._shards.locate(np.array([index])))
        keys = self._shards.index(piece)["key"]
        key = keys[row].decode("utf-8", "replace") if row < len(keys) else f"number {row}"
        return f"sample {key} of {self._shards.pieces[piece].path}"

    def fingerprint(self) -> str:
        return self._shards.fingerprint()

    def blocks(self) -> Blocks | None:
        return Blocks(self._shards.block_sizes(BLOCK), WINDOW if self._shards.in_place else 1)

    def will_read(self, indices: np.ndarray) -> None:
        self._shards.will_read(indices)


_UNREAD = object()


def _parsed_json(raw: bytes | None) -> Mapping[str, Any] | None:
    try:
        document = json.loads(raw)
    except (TypeError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def _spec_of(value: Any) -> FieldSpec | None:
    if isinstance(value, bool | int):
        return _INT
    if isinstance(value, float):
        return _FLOAT
    if isinstance(value, str):
        return STRING
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        return STRINGS
    return None


def _whole_number(raw: bytes) -> int | None:
    try:
        return columns.fitting(int(raw), _INT)
    except ValueError:
        return None

"""WebDataset tar shards, as img2dataset writes them: KEY.jpg, KEY.txt and KEY.json a sample."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.sources.base import STRING, STRINGS, Blocks, FieldSpec
from vlp_jax.data.sources.records import empty_strings
from vlp_jax.data.sources.row_source import FLOAT, INT, Rows, RowSource, spec_of_all
from vlp_jax.data.sources.shards import (
    Manifest,
    Piece,
    ShardedSource,
    Shards,
    find_pieces,
    group_by_piece,
)
from vlp_jax.data.sources.tar_index import extensions, index_tar, sample_files, sample_key
from vlp_jax.errors import UserError, unknown_key_message

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
SUFFIXES = (".tar", ".tar.gz", ".tgz")
_USUAL = {*IMAGE_EXTENSIONS, "txt"}  # extensions that may be rare in a shard
BLOCK, WINDOW = 256, 4  # samples of one shard that are read together, and such blocks at a time
_LOOKED_AT = 20  # samples that are looked at to see which fields there are
# Where a config names a field that these lack: how many shards, and samples of all, are looked at.
_SHARDS_LOOKED_AT, _FURTHER = 64, 2048
_FILES_OF = {"image": IMAGE_EXTENSIONS, "text": ("txt",)}  # field -> extensions it may come from
# webdataset's own reading of endings: github.com/webdataset/webdataset, autodecode.py.
NUMBER_EXTENSIONS = ("cls", "cls2", "class", "count", "index", "inx")
TEXT_EXTENSIONS = ("txt", "text", "transcript", "json")
_DECLARED = {"bytes": STRING, "bytes[]": STRINGS, "int64": INT, "float32": FLOAT}  # of a manifest


@dataclass(frozen=True)
class WebDatasetSource(ShardedSource, RowSource):
    """Samples of tar shards, compressed or not.

    The fields are `image` (the file with any extension of an image), `text` (KEY.txt), `id` (KEY),
    each extension by itself ("jpg", "json"; `NUMBER_EXTENSIONS` are whole numbers), the first of
    several ("jpg,png"), and what KEY.json holds ("json.caption", "json.size.width"): text, numbers
    and lists of text. A config may name fields that few samples have. A sample with images of
    several extensions is a bad example where `image` is asked for, and good where "jpg" is.

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

    @cached_property
    def shards(self) -> Shards:
        return Shards(self._found[0], "tar", index_tar, self.cache_dir, self.cache_gib)

    @cached_property
    def _found(self) -> tuple[list[Piece], Manifest | None]:
        return find_pieces(self.path, SUFFIXES, "webdataset")

    @cached_property
    def _declared(self) -> dict[str, FieldSpec]:
        """The fields of the JSON files that a manifest declares."""
        features = self._found[1].features if self._found[1] is not None else {}
        known = {name: kind for name, kind in features.items() if kind in _DECLARED}
        return {f"json.{name}": _DECLARED[kind] for name, kind in known.items()}

    @cached_property
    def _fields(self) -> dict[str, FieldSpec]:
        """The fields of the first samples; `look_for` adds fields of other samples."""
        samples = self._first_samples()
        if not samples:
            why = faults.explain(self.shards.fault(0, self.shards.pieces[0].skip).decode())[1]
            raise UserError(
                f"data.path={self.path!r}: no sample can be used; the first is "
                f"{self.describe(0)}: {why}"
            )
        files = [sample_files(self.shards.index(piece), row) for piece, row in samples]
        seen = Counter(extension for sample in files for extension in sample)
        # Dots in a key make an extension of its own for every sample.
        usual = {e for e, n in seen.items() if "." not in e or n > 1 or len(samples) == 1}
        # An image format or text that few samples have is no accident of a key.
        usual |= extensions(self.shards.index(samples[0][0])) & _USUAL
        fields = {"image": STRING} if usual & set(IMAGE_EXTENSIONS) else {}
        fields |= {"text": STRING} if "txt" in usual else {}
        fields["id"] = STRING
        fields |= {name: INT if name in NUMBER_EXTENSIONS else STRING for name in sorted(usual)}
        documents = self._documents(samples)
        for key in dict.fromkeys(key for document in documents for key in document):
            spec = spec_of_all(document.get(key) for document in documents)
            fields |= {} if spec is None else {f"json.{key}": spec}
        return fields | self._declared

    def _documents(self, samples: Sequence[tuple[int, int]]) -> list[Mapping[str, Any]]:
        """The JSON files of samples that have one that can be read."""
        found = []
        for piece, row in samples:
            files = sample_files(self.shards.index(piece), row)
            with contextlib.suppress(faults.BadExample, KeyError):
                found.append(_parsed_json(self.shards.read(piece, *files["json"])))
        return found

    @cached_property
    def _further_documents(self) -> list[Mapping[str, Any]]:
        rows = [
            (piece, int(row))
            for piece in self.shards.near(_SHARDS_LOOKED_AT)
            for row in np.flatnonzero(self.shards.index(piece)["fault"] == 0)
        ]
        return self._documents(rows[:: -(-len(rows) // _FURTHER) or 1])

    def _first_samples(self) -> list[tuple[int, int]]:
        """Some sound samples as (piece, row), from the first shard that has any."""
        # The first shards may be damaged or empty.
        for piece, shard in enumerate(self.shards.pieces):
            sound = np.flatnonzero(self.shards.index(piece)["fault"][shard.skip :] == 0)
            found = [(piece, shard.skip + int(row)) for row in sound[:_LOOKED_AT]]
            if found:
                return found
        return []

    def look_for(self, name: str) -> str:
        key = name.removeprefix("json.")
        known = name in self._fields and (key == name or self._fields[name] != INT)
        if known or name in self._declared:
            return ""
        if key == name:
            pieces = self.shards.near(_SHARDS_LOOKED_AT)
            present = set().union(*(extensions(self.shards.index(piece)) for piece in pieces))
            if present & set(_extensions_of(name)):
                self._fields[name] = INT if name in NUMBER_EXTENSIONS else STRING
                return ""
            return _dots(name, present)
        documents = self._further_documents
        spec = spec_of_all(_at(document, key) for document in documents)
        if spec is not None:
            self._fields[name] = spec
            return ""
        seen = {f"json.{key}" for document in documents for key in document}
        looked_at = f"the {len(documents):,} samples that were looked at"
        return unknown_key_message(name, {*self._fields, *seen}, looked_at)

    def fields(self) -> dict[str, FieldSpec]:
        return self._fields

    def rows(self, indices: np.ndarray, names: Sequence[str]) -> tuple[Rows, np.ndarray]:
        rows: Rows = {name: [None] * len(indices) for name in names}
        found = empty_strings(len(indices))
        pieces, places = self.shards.locate(indices)
        for piece, chosen in group_by_piece(pieces):
            for number in chosen.tolist():
                found[number] = self._sample(piece, int(places[number]), number, rows)
        return rows, found

    def can_read(self, name: str) -> bool:
        if name.startswith("json."):
            return self.can_read("json")
        return any(not self.look_for(e) and e in self._fields for e in name.split(","))

    def is_text(self, name: str) -> bool:
        return name.split(",")[0] in TEXT_EXTENSIONS

    def place(self, index: int, name: str) -> tuple[str, int] | None:
        (piece,), (row,) = self.shards.locate(np.array([index]))
        path = self.shards.pieces[piece].path
        if self.shards.copies.is_compressed(path):
            return None
        files = sample_files(self.shards.index(piece), int(row))
        return path, next(files[e][0] for e in _extensions_of(name) if e in files)

    def _sample(self, piece: int, row: int, number: int, rows: Rows) -> bytes:
        """Puts the fields of a sample into `rows`; returns its fault."""
        fault = self.shards.fault(piece, row)
        if fault:
            return fault
        index = self.shards.index(piece)
        files = sample_files(index, row)
        document: Any = None
        try:
            for name, column in rows.items():
                if name == "id":
                    column[number] = sample_key(index, row)
                    continue
                extension, _, key = name.partition("json.")
                raw = self._content(piece, files, "json" if key else extension)
                if not key:
                    column[number] = _whole_number(raw) if name in NUMBER_EXTENSIONS else raw
                else:
                    # Parsed once, however many of its values are fields.
                    document = _parsed_json(raw) if document is None else document
                    column[number] = _at(document, key)
        except faults.BadExample as bad:
            return faults.marked(bad.reason, bad.detail)
        return b""

    def _content(self, piece: int, files: Mapping[str, tuple[int, int]], name: str) -> bytes:
        """The bytes of a sample's file `name`, an extension, `image` or `text`."""
        present = [extension for extension in _extensions_of(name) if extension in files]
        if not present:
            raise faults.BadExample(faults.MISSING_FIELD, f"it has no {name!r}")
        if len(present) > 1 and name == "image":
            listed = ", ".join(present)
            raise faults.BadExample(
                faults.AMBIGUOUS, f"it has several images ({listed}): name one by data.fields.image"
            )
        return self.shards.read(piece, *files[present[0]])

    def class_names(self, field: str) -> tuple[str, ...] | None:
        manifest = self._found[1]
        return None if manifest is None else manifest.class_names.get(field.removeprefix("json."))

    def describe(self, index: int) -> str:
        piece, row = (int(x[0]) for x in self.shards.locate(np.array([index])))
        index = self.shards.index(piece)
        known = row < len(index["fault"])
        key = sample_key(index, row).decode("utf-8", "replace") if known else f"number {row}"
        return f"sample {key} of {self.shards.pieces[piece].path}"

    def blocks(self) -> Blocks | None:
        return Blocks(self.shards.block_sizes(BLOCK), WINDOW if self.shards.in_place else 1)


def _parsed_json(raw: bytes) -> Mapping[str, Any]:
    """Parses an object of JSON in UTF-8, UTF-16 or UTF-32 (RFC 4627, section 3)."""
    try:
        document = json.loads(raw)
    except UnicodeDecodeError:
        raise faults.BadExample(faults.MALFORMED_TEXT, "its json is not UTF-8") from None
    except ValueError as error:
        raise faults.BadExample(faults.UNREADABLE, f"its json is malformed: {error}") from None
    if not isinstance(document, dict):
        raise faults.BadExample(faults.UNREADABLE, "its json is no object")
    return document


def _at(document: Mapping[str, Any], key: str) -> Any:
    """The value of a key, or of nested ones between dots; None if there is none."""
    if key in document:
        return document[key]
    head, dot, rest = key.partition(".")
    inner = document.get(head)
    return _at(inner, rest) if dot and isinstance(inner, dict) else None


def _dots(name: str, present: Iterable[str]) -> str:
    """Explains that dots in keys made other extensions of `name`; "" if they did not."""
    ends = tuple(f".{extension}" for extension in _extensions_of(name))
    longer = min((e for e in present if e.endswith(ends)), default=None)
    if longer is None:
        return ""
    return (
        f"a key ends at the first dot of a file's name, so that files have extensions such as "
        f"{longer!r}: pack them again with keys without dots, or name that extension"
    )


def _extensions_of(name: str) -> Sequence[str]:
    """The extensions that a field may come from; a name may list several between commas."""
    return _FILES_OF.get(name) or name.split(",")


def _whole_number(raw: bytes) -> int | None:
    try:
        return int(raw)
    except ValueError:
        return None

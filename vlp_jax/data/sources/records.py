"""TFRecord and ArrayRecord files: records read by their number, and tf.train.Examples in them."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import google_crc32c
import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.files import retrying
from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.sources.base import STRING, Blocks, FieldSpec, Names
from vlp_jax.data.sources.shards import (
    DAMAGED,
    TRUNCATED,
    Index,
    Piece,
    ShardedSource,
    Shards,
    find_pieces,
    group_by_piece,
)
from vlp_jax.errors import UserError, unknown_key_message

# length, masked CRC of the length; the data; masked CRC of the data (tensorflow/core/lib/io,
# record_writer.h and crc32c.h)
_HEADER, _FOOTER = struct.Struct("<QI"), struct.Struct("<I")
# In the last block of a whole ArrayRecord file (google/array_record, cpp/array_record_writer.cc and
# layout.proto, RiegeliPostscript.magic, as a varint).
_POSTSCRIPT, _POSTSCRIPT_BYTES = bytes.fromhex("dec0ebfe84cec3c971"), 1 << 16
_READERS = 256  # ArrayRecord files kept open


class RecordSource(ShardedSource):
    """A source whose records are the serialized examples of `files`, one string each."""

    files: RecordFiles

    @property
    def shards(self) -> Shards:
        return self.files.shards

    def record_fields(self) -> dict[str, FieldSpec]:
        return {"record": STRING, faults.FAULT: STRING}

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        records, found = self.files.read(np.asarray(indices, np.int64))
        return {"record": records, faults.FAULT: found}


class TFRecordFiles:
    """TFRecord files, by an index of their records' places. Checksums are verified.

    `read` gives the records at `indices`, and their faults: byte strings [n], empty where all is
    well.
    """

    def __init__(self, pieces: Sequence[Piece], **cache: Any) -> None:
        self.shards = Shards(pieces, "tfrecord", index_tfrecord, **cache)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records, found = empty_strings(len(indices)), empty_strings(len(indices))
        pieces, rows = self.shards.locate(indices)
        for piece, places in group_by_piece(pieces):
            index = self.shards.index(piece)
            offsets, lengths = index["offset"], index["length"]
            for place in places:
                row = int(rows[place])
                found[place] = self.shards.fault(piece, row)
                if found[place]:
                    continue
                length = int(lengths[row])
                raw = self.shards.read(piece, int(offsets[row]), length + _FOOTER.size)
                data = raw[:length]
                if raw[length:] != _FOOTER.pack(masked_crc(data)):
                    found[place] = faults.marked(faults.UNREADABLE, "its checksum is wrong")
                else:
                    records[place] = data
        return records, found


class ArrayRecordFiles:
    """ArrayRecord files, by the format's own index."""

    def __init__(self, pieces: Sequence[Piece], **cache: Any) -> None:
        self.shards = Shards(pieces, "array_record", index_array_record, **cache)
        # Each open file costs a descriptor and a buffer. It is closed when its last reader lets go.
        self._reader = lru_cache(_READERS)(_open_array_record)

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        records, found = empty_strings(len(indices)), empty_strings(len(indices))
        pieces, rows = self.shards.locate(indices)
        for piece, places in group_by_piece(pieces):
            try:
                reader = self._reader(self.shards.local(piece))
                wanted = rows[places].tolist()
                records[places] = retrying(
                    self.shards.pieces[piece].path, lambda r=reader, w=wanted: _read(r, w)
                )
            except _ARRAY_RECORD_DAMAGE:
                # The library does not say which record is damaged: each is read alone.
                for place in places:
                    self._read_one(piece, int(rows[place]), place, records, found)
        return records, found

    def _read_one(
        self, piece: int, row: int, place: int, records: np.ndarray, found: np.ndarray
    ) -> None:
        """Reads one record of a file of which some cannot be read."""
        try:
            records[place] = _read(self._reader(self.shards.local(piece)), [row])[0]
        except _ARRAY_RECORD_DAMAGE as error:
            detail = (str(error).splitlines() or ["it cannot be read"])[0]
            unreadable = faults.marked(faults.UNREADABLE, detail)
            found[place] = self.shards.fault(piece, row) or unreadable


# What the library raises for records that cannot be decoded.
_ARRAY_RECORD_DAMAGE = (RuntimeError, IndexError, ValueError)


def _read(reader: Any, rows: list[int]) -> np.ndarray:
    result = empty_strings(len(rows))
    result[:] = reader.read(rows)
    return result


def _open_array_record(file: str) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    # Reading ahead helps sequential reading alone, and costs 16 MiB a file.
    return ArrayRecordReader(file, options="readahead_buffer_size:0", file_reader_buffer_size=32768)


def index_array_record(path: str) -> Index:
    """Counts the records of an ArrayRecord file; one damaged record if it cannot be opened."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)  # what fails here is the disk, not the format
        file.seek(max(0, size - _POSTSCRIPT_BYTES))
        whole = _POSTSCRIPT in file.read()
    try:
        # Of a file that is cut short, or of another format, the library says that it has no record.
        count = _open_array_record(path).num_records() if whole else 0
    except _ARRAY_RECORD_DAMAGE:
        whole, count = False, 0
    return {"fault": np.zeros(count, np.uint8) if whole else np.array([TRUNCATED], np.uint8)}


def index_tfrecord(path: str) -> Index:
    """Finds the places of a TFRecord file's records.

    Returns:
      offset and length (of the data, int64) and fault (uint8), all [records]. What is left of a
      file that ends within a record, or whose next length is damaged, counts as one record.
    """
    size = os.path.getsize(path)
    offsets, lengths, faulty = [], [], []
    descriptor = os.open(path, os.O_RDONLY)
    try:
        # Only headers are read, so the pass takes as many small reads as there are records.
        place = 0
        while place < size:
            header = os.pread(descriptor, _HEADER.size, place)
            length = fault = 0
            if len(header) < _HEADER.size:
                fault = TRUNCATED
            else:
                length, crc = _HEADER.unpack(header)
                if crc != masked_crc(header[:8]):
                    length, fault = 0, DAMAGED
                elif place + _HEADER.size + length + _FOOTER.size > size:
                    length, fault = 0, TRUNCATED
            offsets.append(place + _HEADER.size)
            lengths.append(length)
            faulty.append(fault)
            if fault:
                break
            place += _HEADER.size + length + _FOOTER.size
    finally:
        os.close(descriptor)
    return {
        "offset": np.array(offsets, np.int64),
        "length": np.array(lengths, np.int64),
        "fault": np.array(faulty, np.uint8),
    }


RecordFiles = TFRecordFiles | ArrayRecordFiles


def masked_crc(data: bytes) -> int:
    """The checksum of TFRecord files: CRC-32C, rotated by 15 bits, plus a constant."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def empty_strings(count: int) -> np.ndarray:
    """Empty byte strings [count] as objects, which unlike NumPy's own keep trailing zero bytes."""
    array = np.empty(count, object)
    array[:] = b""
    return array


DTYPES = {"bytes": np.dtype(object), "int64": np.dtype(np.int64), "float32": np.dtype(np.float32)}
BLOCK, WINDOW = 256, 4  # records of one file that are read together, and such blocks at a time
_LOOKED_AT = 20  # records that are looked at to see which features there are
_FURTHER = 1024  # of all records, where a config names a feature that the first ones lack
_COLUMN_CHUNK = 1024


@dataclass(frozen=True)
class TFRecordSource(RecordSource):
    """tf.train.Example records in TFRecord files, gzipped or not.

    The fields are the examples' features under their own names; `features` of img2dataset's files
    are key, jpg, caption, url, width, height and so on.

    Attributes:
      path: files, patterns with "*" and brace ranges, a folder, on disk or scheme://; or the
        manifest of prepared data.
      features: name -> "bytes", "int64" or "float32" for one value, "bytes[]" and so on for a
        list; None looks at the manifest, or at the first records.
      cache_dir: where indexes and copies of remote files are kept; None: ~/.cache/vlp_jax/data.
      cache_gib: room for the copies.

    Raises:
      UserError: for files that are not there, or hold no example.
    """

    path: str | Sequence[str]
    features: Mapping[str, str] | None = None
    cache_dir: str | None = None
    cache_gib: float = 64.0

    kind: ClassVar[str] = "tfrecord"
    suffix: ClassVar[tuple[str, ...]] = (".tfrecord", ".tfrecord.gz")
    reader: ClassVar[type] = TFRecordFiles

    def __post_init__(self) -> None:
        _ = self._features

    @cached_property
    def _found(self) -> Any:
        return find_pieces(self.path, self.suffix, self.kind)

    @cached_property
    def files(self) -> RecordFiles:
        return self.reader(self._found[0], cache_dir=self.cache_dir, cache_gib=self.cache_gib)

    @cached_property
    def _features(self) -> dict[str, FieldSpec]:
        manifest = self._found[1]
        if self.features is not None:
            return {name: _feature(name, kind) for name, kind in dict(self.features).items()}
        if manifest is not None:
            return {name: _feature(name, kind) for name, kind in manifest.features.items()}
        return self._seen_features()

    @property
    def fields_are_declared(self) -> bool:
        return self.features is not None or self._found[1] is not None

    def look_for(self, name: str) -> str:
        if name in self._features or self.fields_are_declared:
            return ""
        shards = self.shards
        count = len(self) if shards.in_place else shards.pieces[0].count
        indices = np.arange(0, count, -(-count // _FURTHER))
        found = self._features_of(indices)
        if name in found:
            self._features[name] = found[name]
            return ""
        looked_at = f"the {len(indices):,} records that were looked at"
        unknown = unknown_key_message(name, {**self._features, **found}, looked_at)
        return f"{unknown}, or name all by data.features"

    def _seen_features(self) -> dict[str, FieldSpec]:
        """The features of the first examples; `look_for` adds features of other examples."""
        count = min(_LOOKED_AT, len(self))
        found = self._features_of(np.arange(count))
        if not found:
            raise UserError(
                f"data.path={self.path!r}: none of the first {count} records can be read as a "
                "tf.train.Example; name their features by data.features"
            )
        return found

    def _features_of(self, indices: np.ndarray) -> dict[str, FieldSpec]:
        """The features of some examples; one that ever has several values is a list."""
        records, bad = self.files.read(indices)
        found: dict[str, FieldSpec] = {}
        # A list that happens to hold a single value in one example is a list in others.
        for record in records[bad == b""]:
            try:
                example = tf.train.Example.FromString(record)
            except Exception as error:  # protobuf's DecodeError is not public
                raise UserError(
                    f"{self.describe(0)} and others hold no tf.train.Example: {error}"
                ) from None
            for name, feature in sorted(example.features.feature.items()):
                spec = _spec_of(feature)
                if spec is not None and (name not in found or spec.shape):
                    found[name] = spec
        return found

    def fields(self) -> dict[str, FieldSpec]:
        return self._features

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        specs = {}
        for name in names:
            spec = self._features[name]
            dtype = tf.as_dtype(spec.dtype)
            one = tf.io.FixedLenFeature([], dtype)
            several = tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)
            specs[name] = several if spec.shape else one
        return dict(tf.io.parse_single_example(record["record"], specs)) if specs else {}

    def column(self, name: str) -> np.ndarray:
        values = np.ma.masked_all(len(self), self._features[name].dtype)
        for first in range(0, len(self), _COLUMN_CHUNK):
            indices = np.arange(first, min(first + _COLUMN_CHUNK, len(self)))
            records, bad = self.files.read(indices)
            for index, record in zip(indices[bad == b""], records[bad == b""], strict=True):
                feature = tf.train.Example.FromString(record).features.feature[name]
                found = getattr(feature, feature.WhichOneof("kind") or "int64_list").value
                if len(found) == 1:
                    values[index] = found[0]
        return values

    def class_names(self, field: str) -> tuple[str, ...] | None:
        manifest = self._found[1]
        return None if manifest is None else manifest.class_names.get(field)

    def blocks(self) -> Blocks | None:
        return Blocks(self.shards.block_sizes(BLOCK), WINDOW)


@dataclass(frozen=True)
class ArrayRecordSource(TFRecordSource):
    """tf.train.Example records in ArrayRecord files; see `TFRecordSource`."""

    kind: ClassVar[str] = "array_record"
    suffix: ClassVar[tuple[str, ...]] = (".array_record",)
    reader: ClassVar[type] = ArrayRecordFiles

    def blocks(self) -> Blocks | None:
        """Files that are copied first are blocks; None if all are local, for random access."""
        return None if self.shards.in_place else super().blocks()


def _feature(name: str, kind: str) -> FieldSpec:
    base = kind.removesuffix("[]") if isinstance(kind, str) else kind
    if base not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"data.features.{name}={kind!r} must be one of {known}, or that with []")
    return FieldSpec((None,) if kind.endswith("[]") else (), DTYPES[base])


def _spec_of(feature: Any) -> FieldSpec | None:
    """The type of a tf.train.Feature; None if it is empty."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if not values:
        return None
    dtype = DTYPES[{"bytes_list": "bytes", "int64_list": "int64", "float_list": "float32"}[kind]]
    return FieldSpec(() if len(values) == 1 else (None,), dtype)

"""Serialized records in TFRecord and ArrayRecord files, read by their number."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import google_crc32c
import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.files import retrying
from vlp_jax.data.sources.base import STRING, FieldSpec, Names
from vlp_jax.data.sources.shards import (
    DAMAGED,
    TRUNCATED,
    Index,
    Piece,
    ShardedSource,
    Shards,
    group_by_piece,
)

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

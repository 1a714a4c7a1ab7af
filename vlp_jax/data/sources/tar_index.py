"""Indexes of WebDataset tar shards: the place of each file of each sample.

A sample is a run of files whose names agree up to the first dot of the last part; what follows is
the file's extension (webdataset/webdataset, tariterators.py, `base_plus_ext`).
"""

from __future__ import annotations

import os
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

import numpy as np

from vlp_jax.data.sources.shards import APART, DAMAGED, OK, SPARSE, TRUNCATED, TWICE, Index

_BLOCK, _KIND = 512, 156  # bytes of a header, and where it says what follows
_RECORD = 20 * _BLOCK  # tar fills an archive up with zeros to a multiple of it
_PIECE = 1 << 20


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, and where its bytes are; without a name, only a fault."""

    name: str
    offset: int
    size: int
    fault: int = OK


@dataclass
class _Sample:
    """A run of files with one key.

    Attributes:
      files: (extension, offset, size) of each.
      counts: how often each extension occurs.
    """

    key: str
    fault: int = OK
    files: list[tuple[str, int, int]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, extension: str, member: Member) -> None:
        self.files.append((extension, member.offset, member.size))
        self.counts[extension] += 1
        if not self.fault and self.counts[extension] > 1:
            self.fault = TWICE
        self.fault = member.fault or self.fault

    def rows(self) -> list[_Sample]:
        """The sample, and before it a bad one for each further sample of the same key."""
        # Two samples of one key side by side look like one with every extension twice. Each must
        # be counted as bad.
        most = max(self.counts.values(), default=1)
        return [*(_Sample(self.key, TWICE) for _ in range(most - 1)), self]


def index_tar(path: str) -> Index:
    """Indexes the samples of a local, uncompressed tar file.

    Returns:
      fault (uint8 [samples]); key, their keys one after another as bytes, and key_end (int64
      [samples]), where each ends; file_end (int64 [samples]), where the files of each end;
      extension and extension_end, stored like the keys, offset and size (int64), all [files];
      end_mark (bool [1]), whether the archive's end is there. A sample that the archive's end
      cuts, or that stands where a header is damaged, is the last. Samples of one key side by side,
      and those whose files lie apart, have a fault.
    """
    samples: list[_Sample] = []
    for member in members(path):
        key, extension = split_name(member.name)
        if member.fault and not member.name:
            # A damaged header hides whose it was: of the sample before, or of another.
            samples.append(_Sample(f"{samples[-1].key if samples else ''}?", member.fault))
            break
        if not extension:
            continue
        if not samples or samples[-1].key != key:
            samples.append(_Sample(key))
        samples[-1].add(extension, member)
    _mark_apart(samples)
    rows = [row for sample in samples for row in sample.rows()]
    files = [file for row in rows for file in row.files]
    key, key_end = _joined([row.key for row in rows])
    extension, extension_end = _joined([name for name, _, _ in files])
    return {
        "key": key,
        "key_end": key_end,
        "file_end": np.cumsum([len(row.files) for row in rows], dtype=np.int64),
        "extension": extension,
        "extension_end": extension_end,
        "offset": np.array([offset for _, offset, _ in files], np.int64),
        "size": np.array([size for _, _, size in files], np.int64),
        "fault": np.array([row.fault for row in rows], np.uint8),
        "end_mark": np.array([_has_end_mark(path)]),
    }


def sample_key(index: Index, row: int) -> bytes:
    """The key of a sample."""
    return _part(index["key"], index["key_end"], row)


def sample_files(index: Index, row: int) -> dict[str, tuple[int, int]]:
    """Extension -> (offset, size) of the files of a sample, in their order."""
    end = int(index["file_end"][row])
    return {
        _part(index["extension"], index["extension_end"], file).decode(
            "utf-8", "surrogateescape"
        ): (int(index["offset"][file]), int(index["size"][file]))
        for file in range(int(index["file_end"][row - 1]) if row else 0, end)
    }


def extensions(index: Index) -> set[str]:
    """All extensions in a shard."""
    joined, ends = index["extension"].tobytes(), index["extension_end"].tolist()
    parts = {joined[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)}
    return {part.decode("utf-8", "surrogateescape") for part in parts}


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a file's name; the extension is empty if it has none."""
    folder, slash, file = name.rpartition("/")
    base, dot, extension = file.partition(".")
    return (folder + slash + base, extension.lower()) if dot and base else (name, "")


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar file in their order; a fault that ends the archive comes last."""
    with open(path, "rb") as stream:
        total = os.path.getsize(path)
        if not total:
            yield Member("", 0, 0, TRUNCATED)  # even an empty archive has an end
        tar = _Headers(fileobj=stream, encoding="utf-8", errors="surrogateescape")
        while (place := tar.offset) < total:
            stream.seek(place)
            try:
                info = tarfile.TarInfo.fromtarfile(tar)
            except tarfile.HeaderError:
                fault = _fault_at(stream, place, total)
                if fault:
                    yield Member("", place, 0, fault)
                return
            begin, sparse = info.offset_data, info.sparse is not None
            # The library goes on without the long name that a damaged header of pax had.
            stream.seek(place + _KIND)
            if stream.read(1) == tarfile.XHDTYPE and not info.pax_headers:
                yield Member("", place, 0, DAMAGED)
                return
            cut = (tar.offset if sparse else begin + info.size) > total
            if info.isreg():
                fault = TRUNCATED if cut else SPARSE if sparse else OK
                yield Member(info.name, begin, 0 if fault else info.size, fault)
            if cut:
                return


class _Headers(tarfile.TarFile):
    """An archive whose headers are read one by one, so that the damage of each is known."""

    def next(self) -> None:
        """Reads nothing when the archive is opened."""


def _fault_at(stream: BinaryIO, place: int, total: int) -> int:
    """Why there is no header at `place`; `OK` at the archive's end."""
    stream.seek(place)
    header = stream.read(_BLOCK)
    if header.strip(b"\0"):
        return TRUNCATED if len(header) < _BLOCK else DAMAGED
    # The archive's end is a block of zeros. What follows its fill is another archive, or what a
    # hole in the file leaves.
    rest = iter(lambda: stream.read(_PIECE), b"")
    return DAMAGED if total - place > _RECORD and any(p.strip(b"\0") for p in rest) else OK


def _has_end_mark(path: str) -> bool:
    """Whether a tar file ends in a block of zeros."""
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _BLOCK))
        return not stream.read().strip(b"\0")


def _mark_apart(samples: list[_Sample]) -> None:
    """Marks runs of one key that lie apart and are parts of one sample as faulty.

    Two runs that share an extension are two samples.
    """
    # A tar that was packed in the order of a folder's listing splits samples in this way.
    runs: dict[str, list[_Sample]] = {}
    for sample in samples:
        runs.setdefault(sample.key, []).append(sample)
    for same in runs.values():
        names = [{name for name, _, _ in sample.files} for sample in same]
        if len(same) > 1 and sum(map(len, names)) == len(set().union(*names)):
            for sample in same:
                sample.fault = sample.fault or APART


def _joined(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Joins texts: their bytes, uint8 [bytes], and the end of each, int64 [texts]."""
    parts = [text.encode("utf-8", "surrogateescape") for text in texts]
    ends = np.cumsum([len(part) for part in parts], dtype=np.int64)
    return np.frombuffer(b"".join(parts), np.uint8), ends


def _part(joined: np.ndarray, ends: np.ndarray, number: int) -> bytes:
    return joined[int(ends[number - 1]) if number else 0 : int(ends[number])].tobytes()

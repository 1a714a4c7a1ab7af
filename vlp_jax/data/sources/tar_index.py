"""Indexes of WebDataset tar shards: the place of each file of each sample.

A sample is a run of files whose names agree up to the first dot of the last part; what follows is
the file's extension (webdataset/webdataset, tariterators.py, `base_plus_ext`). Archives are
POSIX.1-1988 (ustar) with the long names of GNU and pax.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from vlp_jax.data.sources.shards import APART, DAMAGED, OK, SPARSE, TRUNCATED, TWICE, Index

_BLOCK = 512
_RECORD = 20 * _BLOCK  # tar fills an archive up with zeros to a multiple of it
_PIECE = 1 << 20
_REGULAR = (b"0", b"\0", b"7")
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK, _GNU_SPARSE = b"x", b"g", b"L", b"K", b"S"


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, and where its bytes are; without a name, only a fault."""

    name: str
    offset: int
    size: int
    fault: int = OK


@dataclass
class _Sample:
    """A run of files with one key: extension, offset, size of each; and counts of extensions."""

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
    total = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if not total:
            yield Member("", 0, 0, TRUNCATED)  # even an empty archive has an end
        place, notes = 0, _Notes()
        while place < total:
            header = os.pread(descriptor, _BLOCK, place)
            if not header.strip(b"\0"):
                # The archive's end is a block of zeros. What follows its fill is another archive,
                # or what a hole in the file leaves.
                if total - place > _RECORD and _has_content(descriptor, place):
                    yield Member("", place, 0, DAMAGED)
                return
            if len(header) < _BLOCK or not _is_header(header):
                # A header that ends early or whose checksum is wrong.
                yield Member("", place, 0, TRUNCATED if len(header) < _BLOCK else DAMAGED)
                return
            kind, begin = header[156:157], place + _BLOCK
            of_notes = kind in (_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK) or notes.size is None
            # A file of 8 GiB or more states its size in a header of its own (pax).
            size = _number(header[124:136]) if of_notes else notes.size
            cut = begin + size > total
            if kind in (_PAX, _GNU_NAME) and not cut:
                try:
                    notes = _notes(os.pread(descriptor, size, begin), kind, notes)
                except ValueError:
                    yield Member("", place, 0, DAMAGED)
                    return
            elif kind not in (_PAX_GLOBAL, _GNU_LINK):
                sparse = notes.sparse or kind == _GNU_SPARSE
                if kind in (*_REGULAR, _GNU_SPARSE):
                    fault = TRUNCATED if cut else SPARSE if sparse else OK
                    yield Member(notes.name or _name(header), begin, 0 if fault else size, fault)
                if kind == _GNU_SPARSE:
                    begin = _behind_map(descriptor, header, begin)
                notes = _Notes()
            if cut:
                return
            place = begin + -(-size // _BLOCK) * _BLOCK
    finally:
        os.close(descriptor)


@dataclass(frozen=True)
class _Notes:
    """Long name, size and sparseness of a file, as headers before its own say; None if not."""

    name: str | None = None
    size: int | None = None
    sparse: bool = False


def _notes(content: bytes, kind: bytes, before: _Notes) -> _Notes:
    """Adds what a header of a long name, or of pax, says; raises ValueError if it is damaged."""
    if kind == _GNU_NAME:
        name = content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
        return replace(before, name=name)
    said: dict[bytes, bytes] = {}
    while content:  # records of "LENGTH KEY=VALUE\n"
        length = int(content.partition(b" ")[0])
        if not 0 < length <= len(content):
            raise ValueError(f"a record of {length} bytes")
        key, _, value = content[:length].partition(b" ")[2].partition(b"=")
        said[key] = value[:-1]
        content = content[length:]
    name = said.get(b"GNU.sparse.name", said.get(b"path"))
    return _Notes(
        before.name if name is None else name.decode("utf-8", "surrogateescape"),
        int(said[b"size"]) if b"size" in said else before.size,
        any(key.startswith(b"GNU.sparse.") for key in said),
    )


def _behind_map(descriptor: int, header: bytes, begin: int) -> int:
    """The offset of a sparse file's content, behind the blocks that continue its map."""
    more = header[482]
    while more and (block := os.pread(descriptor, _BLOCK, begin)):
        begin, more = begin + _BLOCK, block[504] if len(block) == _BLOCK else 0
    return begin


def _has_end_mark(path: str) -> bool:
    with open(path, "rb") as stream:
        size = stream.seek(0, os.SEEK_END)
        stream.seek(max(0, size - _BLOCK))
        return not stream.read().strip(b"\0")


def _has_content(descriptor: int, place: int) -> bool:
    """Whether a file holds anything but zeros from `place` on."""
    while piece := os.pread(descriptor, _PIECE, place):
        if piece.strip(b"\0"):
            return True
        place += len(piece)
    return False


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


def _is_header(header: bytes) -> bool:
    try:
        noted = int(header[148:156].strip(b"\0 ") or b"0", 8)
        _number(header[124:136])
    except ValueError:
        return False
    # The checksum counts its own field as eight spaces.
    return noted == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Reads an octal number, or, if the highest bit is set, a binary number (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's own magic has no prefix in this place
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")

"""Where the samples of a WebDataset tar shard lie.

A sample is a run of files whose names agree up to the first dot of the last part; what follows is
the file's extension (webdataset/webdataset, tariterators.py, `base_plus_ext`). The archive's format
is that of POSIX.1-1988 (ustar) with GNU's and pax's long names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from vlp_jax.data.sources.shards import DAMAGED, OK, TRUNCATED, Index

_BLOCK = 512
_REGULAR = (b"0", b"\0", b"7")
_PAX, _PAX_GLOBAL, _GNU_NAME, _GNU_LINK = b"x", b"g", b"L", b"K"


@dataclass(frozen=True)
class Member:
    """A file of an archive: its name, and where its bytes are. A fault ends the archive."""

    name: str
    offset: int
    size: int
    fault: int = OK


def index_tar(path: str) -> Index:
    """The samples of a local, uncompressed tar file.

    Returns:
      key (byte strings [samples]), extension ([extensions]), offset and size (int64 [samples,
      extensions], size -1 where a sample lacks it) and fault (uint8 [samples]). A sample that the
      archive's end cuts, or that stands where a header is damaged, is the last.
    """
    keys: list[str] = []
    faults: list[int] = []
    columns: dict[str, int] = {}
    places: list[tuple[int, int, int, int]] = []  # sample, extension, offset, size
    for member in members(path):
        key, extension = split_name(member.name)
        if member.fault and not member.name:
            # A damaged header hides whose it was: of the sample before, or of another.
            keys.append(f"{keys[-1] if keys else ''}?")
            faults.append(member.fault)
            break
        if not extension:
            continue
        if not keys or keys[-1] != key:
            keys.append(key)
            faults.append(OK)
        faults[-1] = faults[-1] or member.fault
        column = columns.setdefault(extension, len(columns))
        places.append((len(keys) - 1, column, member.offset, member.size))
    offset = np.zeros((len(keys), len(columns)), np.int64)
    size = np.full((len(keys), len(columns)), -1, np.int64)
    if places:
        samples, extensions, offsets, sizes = np.array(places, np.int64).T
        offset[samples, extensions], size[samples, extensions] = offsets, sizes
    return {
        "key": np.array([key.encode("utf-8", "surrogateescape") for key in keys], np.bytes_),
        "extension": np.array(list(columns), np.str_),
        "offset": offset,
        "size": size,
        "fault": np.array(faults, np.uint8),
    }


def split_name(name: str) -> tuple[str, str]:
    """Key and lower-case extension of a file's name; the extension is empty if it has none."""
    folder, slash, file = name.rpartition("/")
    base, dot, extension = file.partition(".")
    return (folder + slash + base, extension.lower()) if dot and base else (name, "")


def members(path: str) -> Iterator[Member]:
    """The regular files of a tar file in their order; the last one may have a fault."""
    total = os.path.getsize(path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        place, long_name = 0, None
        while place < total:
            header = os.pread(descriptor, _BLOCK, place)
            if not header.strip(b"\0"):
                return  # the archive's end is a block of zeros
            if len(header) < _BLOCK or not _is_header(header):
                # A header that ends early or whose checksum is wrong.
                yield Member("", place, 0, TRUNCATED if len(header) < _BLOCK else DAMAGED)
                return
            size, kind, begin = _number(header[124:136]), header[156:157], place + _BLOCK
            cut = begin + size > total
            if kind in (_PAX, _GNU_NAME) and not cut:
                try:
                    long_name = _long_name(os.pread(descriptor, size, begin), kind) or long_name
                except ValueError:
                    yield Member("", place, 0, DAMAGED)
                    return
            elif kind not in (_PAX_GLOBAL, _GNU_LINK):
                if kind in _REGULAR:
                    name = long_name or _name(header)
                    yield Member(name, begin, 0 if cut else size, TRUNCATED if cut else OK)
                long_name = None
            if cut:
                return
            place = begin + -(-size // _BLOCK) * _BLOCK
    finally:
        os.close(descriptor)


def _is_header(header: bytes) -> bool:
    try:
        noted = int(header[148:156].strip(b"\0 ") or b"0", 8)
        _number(header[124:136])
    except ValueError:
        return False
    return noted == sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """An octal number, or, with the highest bit set, a binary one (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field, "big") & ((1 << (8 * len(field) - 1)) - 1)
    return int(field.strip(b"\0 ") or b"0", 8)


def _name(header: bytes) -> str:
    name = header[:100].partition(b"\0")[0]
    if header[257:263] == b"ustar\0":  # GNU's own magic has no prefix in this place
        prefix = header[345:500].partition(b"\0")[0]
        name = prefix + b"/" + name if prefix else name
    return name.decode("utf-8", "surrogateescape")


def _long_name(content: bytes, kind: bytes) -> str | None:
    if kind == _GNU_NAME:
        return content.partition(b"\0")[0].decode("utf-8", "surrogateescape")
    while content:  # records of "LENGTH KEY=VALUE\n"
        length = int(content.partition(b" ")[0])
        if not 0 < length <= len(content):
            raise ValueError(f"a record of {length} bytes")
        key, _, value = content[:length].partition(b" ")[2].partition(b"=")
        if key == b"path":
            return value[:-1].decode("utf-8", "surrogateescape")
        content = content[length:]
    return None

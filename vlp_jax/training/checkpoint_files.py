"""The files of a checkpoint: whether they are whole, and what happens to those that are not."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Iterator

import google_crc32c
from etils import epath

from vlp_jax.files import is_remote, write_whole

CHECKSUMS = "checksums.json"
# Orbax notes times there when all else is written; nothing of the state is in it.
_NOT_CHECKED = (CHECKSUMS, "_CHECKPOINT_METADATA")
SET_ASIDE = "damaged"  # the folder beside the checkpoints
_READ_BYTES = 1 << 22
_TEMPORARY = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")


def write_checksums(directory: epath.Path) -> None:
    """Writes `checksums.json`: size and CRC-32C (RFC 3720) of every file of state and input.

    Of files in an object store the sizes alone, since reading all of them back would double the
    traffic and the store has checksums of its own.
    """
    with_sums = not is_remote(directory)
    record = {
        name: [size, _crc32c(directory / name) if with_sums else None]
        for name, size in _files(directory)
    }
    write_whole(directory / CHECKSUMS, json.dumps(record))


def damage(directory: epath.Path) -> str | None:
    """What is wrong with the files of a checkpoint, in words; None if nothing is.

    One without `checksums.json` was written by an older version: nothing can be said of it.
    """
    file = directory / CHECKSUMS
    if not file.exists():
        return None
    try:
        record = json.loads(file.read_text())
        found = dict(_files(directory))
    except (OSError, ValueError) as error:
        return f"{file} cannot be read: {error}"
    for name, (size, crc) in record.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes and not {size:,}"
        try:
            if crc is not None and _crc32c(directory / name) != crc:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def set_aside(directory: epath.Path) -> epath.Path:
    """Moves a checkpoint out of the way, to look at later; where it is now."""
    parent = directory.parent.parent / SET_ASIDE
    parent.mkdir(parents=True, exist_ok=True)
    target = parent / f"{directory.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    return directory.rename(target)


def unfinished(checkpoints: epath.Path, step: int) -> Iterator[epath.Path]:
    """The folders in which a checkpoint of `step` was being written."""
    for entry in checkpoints.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and int(match[1]) == step:
            yield entry


def size_of(directory: epath.Path) -> int:
    """Bytes of all files below `directory`."""
    return sum(size for _, size in _files(directory))


def free_bytes(directory: epath.Path) -> int | None:
    """What can still be written there; None where that has no limit that can be known."""
    return None if is_remote(directory) else shutil.disk_usage(os.fspath(directory)).free


def _files(directory: epath.Path) -> Iterator[tuple[str, int]]:
    """(path below `directory`, bytes) of every file that is checked, sorted."""
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            for name, size in _files(entry):
                yield f"{entry.name}/{name}", size
        elif entry.name not in _NOT_CHECKED:
            yield entry.name, entry.stat().length


def _crc32c(file: epath.Path) -> str:
    total = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            total.update(block)
    return total.hexdigest().decode()

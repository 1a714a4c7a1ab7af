"""Files on local disk or any fsspec filesystem: patterns, ranges of bytes, whole-or-nothing writes.

A path is a string: a local path, or a URL such as gs://bucket/folder/file. The filesystems of
clouds retry by themselves (gcsfs, s3fs); what they give up on is raised.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from typing import IO, TYPE_CHECKING

from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import fsspec

INSTALL = "pip install -r requirements-prepare.txt"


def filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The filesystem of a path, and the path in its own terms."""
    try:
        import fsspec.core
    except ImportError:
        raise UserError(f"fsspec is not installed: {INSTALL}") from None
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {error}") from None


def is_local(path: str) -> bool:
    """Whether a path is on a mounted disk."""
    return "://" not in path or path.startswith(("file://", "local://"))


def absolute(path: str) -> str:
    """A local path made absolute, ~ expanded; a URL as it is, without a trailing slash."""
    return filesystem(path)[1] if is_local(path) else path.rstrip("/")


def join(folder: str, *parts: str) -> str:
    """A path below a folder."""
    return "/".join([folder.rstrip("/"), *parts])


def size_of(path: str) -> int | None:
    """The size of a file in bytes, or None if there is no such file."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()  # fsspec keeps listings, and other workers write to the folder
    try:
        return fs.info(inner)["size"]
    except FileNotFoundError:
        return None


def names_in(folder: str) -> list[str]:
    """The names in a folder, sorted; none if there is no such folder."""
    fs, inner = filesystem(folder)
    fs.invalidate_cache()
    try:
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in fs.ls(inner, detail=False))
    except FileNotFoundError:
        return []


def read_bytes(path: str) -> bytes:
    """The whole of a file."""
    fs, inner = filesystem(path)
    return fs.cat_file(inner)


def read_ranges(ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
    """The bytes of (path, offset, size) ranges, all on one filesystem; at once where it can."""
    if not ranges:
        return []
    fs = filesystem(ranges[0][0])[0]
    inner = [fs._strip_protocol(path) for path, _, _ in ranges]
    starts = [offset for _, offset, _ in ranges]
    ends = [offset + size for _, offset, size in ranges]
    results = fs.cat_ranges(inner, starts, ends, on_error="return")
    for (path, offset, size), data in zip(ranges, results, strict=True):
        if isinstance(data, FileNotFoundError):
            raise UserError(f"{path} is gone since it was listed: put it back, and run again")
        if isinstance(data, BaseException):
            raise data
        if len(data) != size:
            raise UserError(
                f"{path} changed since it was listed: {len(data)} bytes at {offset}, not {size}; "
                "prepare it into a new folder"
            )
    return results


def write_bytes(path: str, data: bytes) -> None:
    """Writes a file, whole or not at all."""
    fs, inner = filesystem(path)
    if not is_local(path):
        fs.pipe_file(inner, data)
        return
    os.makedirs(os.path.dirname(inner), exist_ok=True)
    # Renaming replaces the file at once; the flush keeps a power failure from leaving it empty.
    temporary = _temporary_name(inner)
    with open(temporary, "wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, inner)


def _temporary_name(path: str) -> str:
    """A name beside a local file that no other process takes, and `leftovers` finds."""
    folder, name = os.path.split(path)
    return os.path.join(folder, f".{name}.{uuid.uuid4().hex[:12]}.tmp")


@contextlib.contextmanager
def whole_file(path: str) -> Iterator[IO[bytes]]:
    """An open local file that is moved to `path` at the end, and removed after a failure."""
    fs, inner = filesystem(path)
    if is_local(path):
        os.makedirs(os.path.dirname(inner), exist_ok=True)
        stream = open(_temporary_name(inner), "wb")
    else:
        stream = tempfile.NamedTemporaryFile("wb", prefix="prepare_data_", delete=False)
    try:
        with stream:
            yield stream
        if is_local(path):
            os.replace(stream.name, inner)
        else:
            fs.put_file(stream.name, inner)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(stream.name)


def leftovers(folder: str, split: str) -> list[str]:
    """Temporary files of a split that an ended process left in a folder."""
    ours = (f".{split}-", f".{split}.")
    names = [n for n in names_in(folder) if n.startswith(ours) and n.endswith(".tmp")]
    return [join(folder, name) for name in names]


def remove(path: str) -> None:
    """Removes a file, or a folder with all that is in it, if it is there."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def common_folder(paths: Sequence[str]) -> str:
    """The deepest folder that holds all the files."""
    folders = [path.split("/")[:-1] for path in paths]
    same = itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*folders))
    return "/".join(parts[0] for parts in same)

"""Reads of local files at any offset, and local copies of remote and compressed files.

Files on a bucket, or compressed, are copied whole into a cache folder when they are first needed.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import os
import threading
import uuid
import zlib
from collections.abc import Iterator
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from vlp_jax.data.files import HEAD_BYTES, filesystem, is_local, read, retrying, stamp_of
from vlp_jax.errors import UserError

_OPEN_FILES = 512
_UNFINISHED = ".unfinished"
_CUT = ".cut"
# Shared by all caches of the process, because several sources may read one file.
_LOCK = threading.Lock()
_COPYING: dict[str, threading.Lock] = {}
_log = logging.getLogger("vlp_jax.data")


class _File:
    """An open file. It is closed when no thread reads it and no cache keeps it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # where it could not be opened
            os.close(self.number)


class OpenFiles:
    """Reads pieces of local files from many threads, and keeps at most `most` files open."""

    def __init__(self, most: int) -> None:
        self._open = lru_cache(most)(_File)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Reads `length` bytes from `offset` on; fewer at the end of the file."""
        file = self._open(path)
        try:
            # pread takes the place along: threads share a descriptor without moving each other.
            return os.pread(file.number, length, offset)
        except OSError:
            self.drop()  # what went stale is opened anew by the next attempt
            raise

    def drop(self) -> None:
        """Closes all files, for example because one was removed."""
        self._open.cache_clear()


@cache
def open_files() -> OpenFiles:
    """The process-wide cache of open files: a quarter of the limit for files, at most 512."""
    import resource

    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return OpenFiles(max(8, min(_OPEN_FILES, limit // 4)))


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turns a failure to write into a UserError that names the cache folder."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the cache {folder} cannot be written: {error.strerror or error}; make room there, or "
            "set data.cache_dir to another folder"
        ) from error


def default_cache_dir() -> Path:
    """~/.cache/vlp_jax/data, or as XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlp_jax" / "data"


class LocalCopies:
    """Local copies of files that cannot be read in place, in a folder of at most `capacity` bytes.

    The least recently used go first; one file may exceed the capacity.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity

    def get(self, path: str) -> str:
        """Returns a local, uncompressed file with the content of `path`; copies it if needed."""
        if self.in_place(path):
            return path
        # A file that changed gets another name, so that an old copy is never taken for it.
        stamp = retrying(path, lambda: stamp_of(path))
        name = hashlib.sha256(f"{path}:{stamp}".encode()).hexdigest()[:20] + "-" + Path(path).name
        target = self._folder / name
        with _LOCK:
            lock = _COPYING.setdefault(str(target), threading.Lock())
        with lock:
            try:
                # The time of its last use, by which `_make_room` chooses, also of other processes.
                os.utime(target)
            except (FileNotFoundError, NotADirectoryError):
                retrying(path, lambda: self._copy(path, target))
                self._make_room(keep=target)
        return str(target)

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Reads `length` uncompressed bytes of `path` from `offset` on; fewer at its end."""

        def once() -> bytes:
            while True:
                local = self.get(path)
                try:
                    return open_files().read(local, offset, length)
                except FileNotFoundError:
                    if self.in_place(path):
                        raise  # a copy may have made room for another; it is made again

        return retrying(path, once)

    def is_cut(self, path: str) -> bool:
        """Whether `path` is a gzip stream without its end, so that its copy lacks some of it."""
        return not self.in_place(path) and _mark_of_cut(Path(self.get(path))).exists()

    @staticmethod
    def is_compressed(path: str) -> bool:
        return _is_compressed(path, retrying(path, lambda: stamp_of(path)))

    @classmethod
    def in_place(cls, path: str) -> bool:
        return is_local(path) and not cls.is_compressed(path)

    @staticmethod
    def _copy(path: str, target: Path) -> None:
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex}{_UNFINISHED}")
        with writing(target.parent):
            target.parent.mkdir(parents=True, exist_ok=True)
            out = open(unfinished, "wb")
        with filesystem(path).open(path) as raw, out:
            try:
                head = raw.read(HEAD_BYTES)
                whole = _Rejoined(head, raw)
                # read1 gives what comes before a cut, where read would give nothing.
                read = gzip.open(whole).read1 if _is_gzip(head) else whole.read
                while piece := read(1 << 22):
                    with writing(target.parent):
                        out.write(piece)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                # What came before the cut is kept. The cut may lie between two records, where the
                # reader of the copy could not see it.
                _mark_of_cut(target).touch()
                _log.warning("%s is truncated or damaged", path)
        # The name appears only when the copy is whole; processes that copy at once do no harm.
        unfinished.replace(target)

    def _make_room(self, keep: Path) -> None:
        found = []
        for file in self._folder.iterdir():
            if file.name.endswith((_UNFINISHED, _CUT)):
                continue
            with contextlib.suppress(FileNotFoundError):  # another thread or process was quicker
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self._capacity or file == keep:
                break
            file.unlink(missing_ok=True)
            _mark_of_cut(file).unlink(missing_ok=True)
            open_files().drop()
            total -= size


def _mark_of_cut(copy: Path) -> Path:
    """The empty file that lies beside a copy whose gzip stream has no end."""
    return copy.with_name(copy.name + _CUT)


@cache
def _is_compressed(path: str, stamp: str) -> bool:
    del stamp  # a file that was written anew is looked at anew
    return _is_gzip(read(path, HEAD_BYTES))


def _is_gzip(head: bytes) -> bool:
    """Whether a file that begins with `head` is gzipped, whatever its name says."""
    try:
        # A TFRecord file may begin with gzip's first bytes, but hardly goes on so.
        zlib.decompressobj(wbits=31).decompress(head)
    except zlib.error:
        return False
    return head[:2] == b"\x1f\x8b"


class _Rejoined:
    """Gives bytes of a stream that were read already, then the rest: not every stream can seek."""

    def __init__(self, head: bytes, rest: Any) -> None:
        self._head, self._rest = head, rest

    def read(self, size: int) -> bytes:
        piece, self._head = self._head[:size], self._head[size:]
        return piece or self._rest.read(size)

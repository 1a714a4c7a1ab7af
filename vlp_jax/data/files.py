"""Files of data: patterns of names, reading that outlasts a passing fault, local copies.

A path without "://" is local. Others are opened by fsspec where it has a filesystem for their
scheme (s3://, https://, memory://, gs:// with gcsfs), else by TensorFlow's tf.io.gfile (gs://).
Files that cannot be read at any place at once (on a bucket, or compressed) are copied whole into a
cache folder when they are first needed.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import logging
import os
import random
import shutil
import threading
import time
import zlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import braceexpand

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.errors import UserError

Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between attempts
# Faults that time does not heal.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
_OPEN_FILES = 512
_log = logging.getLogger("vlp_jax.data")


def is_local(path: str) -> bool:
    """Whether `path` is on a disk of this machine."""
    return "://" not in path


def expand(patterns: str | Sequence[str], suffix: str) -> list[str]:
    """The files that patterns name, sorted, each once.

    Args:
      patterns: one or several paths, on disk or scheme://, with "*", "?", "[]" and brace ranges
        ({00000..00041}, {a,b}); or a folder, whose files that end in `suffix` are taken.
      suffix: ".tar" and so on.

    Raises:
      UserError: for a pattern that matches no file, or a file of a brace range that is not there.
    """
    patterns = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    if not patterns:
        raise UserError("data.path is empty: name files, a pattern or a folder")
    found: set[str] = set()
    for pattern in map(str, patterns):
        found.update(_expand_one(os.path.expanduser(pattern), suffix))
    return sorted(found)


def expand_braces(pattern: str) -> list[str]:
    """What {a,b} and {000..041} stand for, in order; zeros in front are kept.

    Raises:
      UserError: for a brace that is not closed.
    """
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"{pattern} has a brace that is not closed") from None


def _expand_one(pattern: str, suffix: str) -> list[str]:
    names = expand_braces(pattern)
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        files = filesystem(name)
        if files.is_folder(name):
            matches = files.glob(f"{name.rstrip('/')}/*{suffix}")
            if not matches:
                raise UserError(f"data.path={name!r} is a folder with no file *{suffix} in it")
        elif any(sign in name for sign in "*?["):
            matches = files.glob(name)
        else:
            matches = [name] if len(names) > 256 or files.exists(name) else []
        found += matches
        missing += [] if matches else [name]
    if not found:
        raise UserError(f"data.path={pattern!r} matches no file")
    if missing:
        raise UserError(
            f"data.path={pattern!r}: {len(missing)} of {len(names)} files are not there; the first "
            f"is {missing[0]!r}"
        )
    return found


class _Local:
    """Files on disk."""

    def exists(self, path: str) -> bool:
        return os.path.isfile(path)

    def is_folder(self, path: str) -> bool:
        return os.path.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        return [p for p in glob.glob(pattern, recursive=True) if os.path.isfile(p)]

    def stamp(self, path: str) -> str:
        stat = os.stat(path)
        return f"{stat.st_size}:{stat.st_mtime_ns}"

    def open(self, path: str) -> BinaryIO:
        return open(path, "rb")


@dataclass(frozen=True)
class _Fsspec:
    """Files of a scheme that fsspec knows."""

    scheme: str
    system: Any

    def exists(self, path: str) -> bool:
        return self.system.isfile(path)

    def is_folder(self, path: str) -> bool:
        return self.system.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        return [self.system.unstrip_protocol(p) for p in self.system.glob(pattern)]

    def stamp(self, path: str) -> str:
        info = self.system.info(path)
        changed = [info.get(k) for k in ("etag", "ETag", "mtime", "updated", "created")]
        return f"{info.get('size')}:{changed}"

    def open(self, path: str) -> BinaryIO:
        return self.system.open(path, "rb")


class _Gfile:
    """Files of a scheme that TensorFlow knows and fsspec does not."""

    @property
    def gfile(self) -> Any:
        return import_tensorflow().io.gfile

    def exists(self, path: str) -> bool:
        return self.gfile.exists(path) and not self.gfile.isdir(path)

    def is_folder(self, path: str) -> bool:
        return self.gfile.isdir(path)

    def glob(self, pattern: str) -> list[str]:
        return self.gfile.glob(pattern)

    def stamp(self, path: str) -> str:
        stat = self.gfile.stat(path)
        return f"{stat.length}:{stat.mtime_nsec}"

    def open(self, path: str) -> BinaryIO:
        return self.gfile.GFile(path, "rb")


def filesystem(path: str) -> _Local | _Fsspec | _Gfile:
    """What opens `path`.

    Raises:
      UserError: for a scheme that neither fsspec nor TensorFlow opens.
    """
    return _Local() if is_local(path) else _remote(path.partition("://")[0])


@cache
def _remote(scheme: str) -> _Fsspec | _Gfile:
    import fsspec

    reason = f"fsspec has no filesystem {scheme}://"
    if scheme in fsspec.available_protocols():
        try:
            return _Fsspec(scheme, fsspec.filesystem(scheme))
        except ImportError as error:
            reason = str(error)
    if scheme in import_tensorflow().io.gfile.get_registered_schemes():
        return _Gfile()
    raise UserError(f"{scheme}:// cannot be opened: {reason}, nor does TensorFlow open it")


@cache
def stamp_of(path: str) -> str:
    """What changes when the file does: its size and time, as they were when first asked for."""
    return filesystem(path).stamp(path)


def retrying(what: str, function: Callable[[], Result]) -> Result:
    """`function()`, tried again with growing delays when reading fails.

    Args:
      what: names it in messages, for example the path.

    Raises:
      UserError: a file that is not there, may not be read, or failed at every attempt.
    """
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return function()
        except _LASTING as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{what} cannot be read: {error.strerror or error}") from error
        except Exception as error:
            # Every client of a bucket has exceptions of its own, for what mostly passes.
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS:
                message = f"{what} cannot be read, tried {ATTEMPTS} times: {_line(error)}"
                raise UserError(message) from error
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            _log.warning("%s: %s; trying again in %.1f s", what, _line(error), delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    return type(error).__module__.partition(".")[0] not in ("builtins", "vlp_jax", "numpy")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class OpenFiles:
    """Reads pieces of local files at any place, from many threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._descriptors: OrderedDict[str, int] = OrderedDict()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """`length` bytes from `offset` on; fewer where the file ends."""
        return retrying(path, lambda: os.pread(self._descriptor(path), length, offset))

    def _descriptor(self, path: str) -> int:
        with self._lock:
            if path in self._descriptors:
                self._descriptors.move_to_end(path)
            else:
                self._descriptors[path] = os.open(path, os.O_RDONLY)
            # The oldest is certainly not being read: there are fewer threads than files kept open.
            if len(self._descriptors) > _OPEN_FILES:
                os.close(self._descriptors.popitem(last=False)[1])
            return self._descriptors[path]


def default_cache_dir() -> Path:
    """~/.cache/vlp_jax/data, or as XDG_CACHE_HOME says."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vlp_jax" / "data"


class LocalCopies:
    """Local copies of files that cannot be read in place; the least recently used go first.

    Args:
      folder: where they lie.
      capacity: bytes; one file may exceed it.
    """

    def __init__(self, folder: Path, capacity: int) -> None:
        self._folder, self._capacity = folder, capacity
        self._locks: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def get(self, path: str) -> str:
        """A local, uncompressed file that holds what `path` does.

        Raises:
          UserError: it cannot be read, or not be written here.
        """
        if self.in_place(path):
            return path
        stamp = retrying(path, lambda: stamp_of(path))
        name = hashlib.sha256(f"{path}:{stamp}".encode()).hexdigest()[:20] + "-" + Path(path).name
        target = self._folder / name
        with self._lock:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            if target.exists():
                os.utime(target)
            else:
                retrying(path, lambda: self._copy(path, target))
                self._make_room(keep=target)
        return str(target)

    @staticmethod
    def in_place(path: str) -> bool:
        """Whether `path` is read where it lies."""
        return is_local(path) and not _is_compressed(path)

    @staticmethod
    def _copy(path: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_name(f"{target.name}.{os.getpid()}.unfinished")
        with filesystem(path).open(path) as raw, open(unfinished, "wb") as out:
            try:
                shutil.copyfileobj(gzip.open(raw) if _is_compressed(path) else raw, out, 1 << 22)
            except (EOFError, gzip.BadGzipFile, zlib.error):
                # A truncated archive keeps what came before the cut; its reader finds the cut.
                _log.warning("%s is truncated or damaged", path)
        unfinished.replace(target)

    def _make_room(self, keep: Path) -> None:
        found = []
        for file in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another thread or process was quicker
                stat = file.stat()
                found.append((stat.st_mtime, stat.st_size, file))
        total = sum(size for _, size, _ in found)
        for _, size, file in sorted(found):
            if total <= self._capacity or file == keep:
                break
            file.unlink(missing_ok=True)
            total -= size


def _is_compressed(path: str) -> bool:
    return path.endswith((".gz", ".gzip", ".tgz"))

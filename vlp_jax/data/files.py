"""Files of data: patterns of names, file systems, reading that outlasts a passing fault.

A path without "://" is local. Others are opened by fsspec where it has a filesystem for their
scheme (s3://, https://, memory://, gs:// with gcsfs), else by TensorFlow's tf.io.gfile (gs://).
"""

from __future__ import annotations

import glob
import logging
import os
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, BinaryIO, TypeVar

import braceexpand

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.errors import UserError

Result = TypeVar("Result")

ATTEMPTS = 6
FIRST_DELAY, LONGEST_DELAY = 0.5, 30.0  # seconds between attempts
# Faults that a second attempt meets again.
_LASTING = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, UserError)
# The same faults as TensorFlow calls them. Its classes cannot be named without importing it.
_LASTING_NAMES = ("NotFoundError", "PermissionDeniedError", "UnauthenticatedError")
_TRUSTED = 1000  # files of a brace range that are looked for before they are read
_log = logging.getLogger("vlp_jax.data")


def is_local(path: str) -> bool:
    """Whether `path` is on a disk of this machine."""
    return "://" not in path


def expand(patterns: str | Sequence[str], suffix: str | tuple[str, ...]) -> list[str]:
    """Finds the files that patterns name, sorted, each once.

    Args:
      patterns: one or several paths, on disk or scheme://, with "*", "?", "[]" and brace ranges
        ({00000..00041}, {a,b}); or a folder, whose files that end in `suffix` are taken. Of a
        file that is there as it is and gzipped, the gzipped one is left out.

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
    """Expands {a,b} and {000..041}, in order; leading zeros are kept."""
    try:
        return list(braceexpand.braceexpand(pattern, escape=False))
    except braceexpand.UnbalancedBracesError:
        raise UserError(f"{pattern} has a brace that is not closed") from None


def _expand_one(pattern: str, suffix: str | tuple[str, ...]) -> list[str]:
    # Each name of a brace range must exist; a glob may match anything.
    names = expand_braces(pattern)
    found: list[str] = []
    missing: list[str] = []
    for name in names:
        files = filesystem(name)
        if len(names) > _TRUSTED:
            matches = [name]  # asking for each takes long; a missing file fails when it is read
        elif files.exists(name):
            matches = [name]
        elif len(names) == 1 and files.is_folder(name):
            matches = _in_folder(name, suffix)
        else:
            matches = files.glob(name) if any(sign in name for sign in "*?[") else []
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


def _in_folder(folder: str, suffix: str | tuple[str, ...]) -> list[str]:
    """Lists the files of a folder that end in `suffix`; for none, an error says what is there."""
    files, below = filesystem(folder), glob.escape(folder.rstrip("/"))
    others = sorted(files.glob(f"{below}/*"))
    # macOS leaves ._00000.tar beside 00000.tar.
    names = [p for p in others if p.endswith(suffix) and not p.rpartition("/")[2].startswith(".")]
    plain = set(names)
    twice = [
        p for p in names if {p.removesuffix(".gz"), p.removesuffix(".tgz") + ".tar"} - {p} & plain
    ]
    if twice:
        _log.warning(
            "%s: %d files are there as they are and gzipped; the gzipped ones are left out, the "
            "first is %s",
            *(folder, len(twice), twice[0]),
        )
    if names:
        return [p for p in names if p not in set(twice)]
    wanted = ", ".join(f"*{end}" for end in ((suffix,) if isinstance(suffix, str) else suffix))
    message = f"data.path={folder!r} is a folder with no file {wanted} in it"
    deeper = next((p for p in files.glob(f"{below}/**") if p.endswith(suffix)), None)
    if deeper is not None:
        pattern = f"{folder.rstrip('/')}/**/*{os.path.splitext(deeper)[1]}"
        raise UserError(f"{message}, but there are some in its folders: set data.path={pattern!r}")
    if others:
        kind, name = kind_of(read(others[0], HEAD_BYTES)), others[0].rpartition("/")[2]
        help_ = f" ({remedy(kind, name)})" if remedy(kind, name) else ""
        message += f"; {name} is {kind}{help_}" if kind else f"; it holds {name}"
    raise UserError(message)


def read(path: str, size: int = -1) -> bytes:
    """Reads a file, or its first `size` bytes; raises UserError if it cannot be read."""

    def once() -> bytes:
        with filesystem(path).open(path) as stream:
            return stream.read(size)

    return retrying(path, once)


class _Local:
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
        return tf.io.gfile

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
    """The filesystem that opens `path`; UserError for a scheme that nothing here opens."""
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
    if scheme in tf.io.gfile.get_registered_schemes():
        return _Gfile()
    raise UserError(f"{scheme}:// cannot be opened: {reason}, nor does TensorFlow open it")


@cache
def stamp_of(path: str) -> str:
    """The size and time of a file, when this process first asked for them."""
    return filesystem(path).stamp(path)


def retrying(what: str, function: Callable[[], Result]) -> Result:
    """Calls `function()`, again after growing delays if reading fails; `what` names it in messages.

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
            if type(error).__name__ in _LASTING_NAMES:
                raise UserError(f"{what} cannot be read: {_line(error)}") from error
            if not _may_pass(error):
                raise
            if attempt == ATTEMPTS:
                message = f"{what} cannot be read, tried {ATTEMPTS} times: {_line(error)}"
                raise UserError(message) from error
            # The random factor keeps many processes from asking a server at the same moments.
            delay = min(LONGEST_DELAY, FIRST_DELAY * 2 ** (attempt - 1)) * random.uniform(0.5, 1)
            _log.warning("%s: %s; trying again in %.1f s", what, _line(error), delay)
            time.sleep(delay)
    raise AssertionError("unreachable")


def _may_pass(error: Exception) -> bool:
    if isinstance(error, OSError):
        return True
    if isinstance(error, ValueError | TypeError | LookupError | ArithmeticError):
        return False
    # Each client of a bucket has exceptions of its own, which cannot be listed here.
    return type(error).__module__.partition(".")[0] not in ("builtins", "vlp_jax", "numpy")


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


HEAD_BYTES = 512
GZIP = "compressed by gzip"

# First bytes -> what such a file is, and the command that makes something readable of it.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", GZIP, "gunzip"),
    (b"BZh", "compressed by bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "compressed by xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unzstd"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unlz4"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "git lfs pull"),
    (b"PAR1", "a Parquet file", ""),
    (b"ARROW1", "an Arrow file", ""),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"\x89PNG", "a PNG image", ""),
)


def kind_of(head: bytes) -> str:
    """The kind of a file that begins with `head` (`HEAD_BYTES` or all of it); "" if not known."""
    if not head:
        return "empty (0 bytes)"
    for signature, kind, _ in _KINDS:
        if head.startswith(signature):
            return kind
    # The magic of a tar stands inside of its first header, behind names and numbers.
    if head[257:262] == b"ustar":
        return "a tar"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a page of HTML or XML: a server's message, not the file"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return "all zeros" if not head.strip(b"\0") else ""


def remedy(kind: str, path: str) -> str:
    """The command that makes the readable file of a file of `kind`; "" if there is none."""
    return next((f"{command} {path}" for _, k, command in _KINDS if k == kind and command), "")

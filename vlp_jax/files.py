"""Writes files atomically, on disk or in an object store, and reads text files of users."""

from __future__ import annotations

import codecs
import io
import os
import re
import uuid
from collections.abc import Iterator

from etils import epath

from vlp_jax.errors import UserError

# UTF-32 comes first: its little-endian mark begins with UTF-16's mark.
_OTHER_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32"),
    (codecs.BOM_UTF32_BE, "UTF-32"),
    (codecs.BOM_UTF16_LE, "UTF-16"),
    (codecs.BOM_UTF16_BE, "UTF-16"),
)
_CONVERT = "save it as UTF-8"
_NUL = f"holds a zero byte: the file is UTF-16 or damaged; {_CONVERT}"
_LINE_END = re.compile(r"\r\n|\r|\n")


def is_remote(path: epath.PathLike) -> bool:
    """Whether `path` is in an object store (gs://, s3://, ...), where files cannot be appended."""
    return "://" in os.fspath(path)


def write_whole(path: epath.PathLike, content: str | bytes) -> None:
    """Writes a file atomically: readers see the old content or the new, also after a crash.

    Makes the folder if needed. A failure leaves no temporary file behind.

    Raises:
      OSError: the file cannot be written. An object store may raise other errors.
    """
    path = epath.Path(path)
    content = content.encode() if isinstance(content, str) else content
    if is_remote(path):
        path.write_bytes(content)  # an object appears only when it is complete
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    # In the same folder, because a rename works only within a file system.
    unfinished = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        unfinished.write_bytes(content)
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def check_writable(folder: epath.PathLike) -> None:
    """Writes a file in `folder` and removes it; OSError if that fails."""
    probe = epath.Path(folder) / f".write_test_{uuid.uuid4().hex}"
    probe.write_text("")
    probe.unlink()


def read_text(path: epath.PathLike, key: str = "") -> str:
    """Reads a text file of a user: UTF-8, with or without a byte order mark.

    Raises:
      UserError: the file cannot be read, or is in another encoding; it names the setting `key`.
    """
    before = f"{key}: " if key else ""
    try:
        content = epath.Path(path).expanduser().read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{before}cannot read the file {path}: {reason}") from None
    return decode_text(content, f"{before}{path}")


def decode_text(content: bytes, where: str) -> str:
    """Decodes UTF-8 with or without a mark; UserError for another encoding, which names `where`."""
    without_mark(content, where)
    text = _decode(content, where, 1)
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise UserError(f"{where}, line {line}, {_NUL}")
    return text


def text_lines(path: epath.PathLike) -> Iterator[str]:
    """Yields the lines of a user's text file, read as by `read_text`, with their ends."""
    try:
        with epath.Path(path).open("rb") as raw:
            # The longest mark has 4 bytes.
            without_mark(raw.read(4), str(path))
            raw.seek(0)
            for number, line in enumerate(io.TextIOWrapper(raw, "utf-8-sig", newline=""), 1):
                if "\0" in line:
                    raise UserError(f"{path}, line {number}, {_NUL}")
                yield line
    except OSError as error:
        raise UserError(f"cannot read the file {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        # The decoder reads ahead of the lines, so a second pass has to find the line.
        with epath.Path(path).open("rb") as raw:
            for number, line in enumerate(raw, 1):
                _decode(line, str(path), number)
        raise UserError(f"{path} is not UTF-8; {_CONVERT}") from None


def read_lines(path: epath.PathLike, key: str = "") -> tuple[str, ...]:
    """Reads a list of a user, an item a line, without empty lines and lines that begin with "#"."""
    stripped = (line.strip() for line in _LINE_END.split(read_text(path, key)))
    lines = tuple(line for line in stripped if line and not line.startswith("#"))
    if not lines:
        raise UserError(f"{key}: the file {path} has no lines")
    return lines


def without_mark(content: bytes, where: str) -> bytes:
    """Removes a byte order mark of UTF-8; UserError if `content` begins with another mark."""
    for mark, name in _OTHER_MARKS:
        if content.startswith(mark):
            raise UserError(f"{where} is {name}, not UTF-8; {_CONVERT}")
    return content.removeprefix(codecs.BOM_UTF8)


def _decode(content: bytes, where: str, first_line: int) -> str:
    """Decodes UTF-8; an error names the line, counted from `first_line`."""
    try:
        # This codec drops a byte order mark, if there is one.
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        reason = f"is not UTF-8: {error.reason}; {_CONVERT}"
        raise UserError(f"{where}, line {line}, {reason}") from None

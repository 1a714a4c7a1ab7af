"""metrics.jsonl: the numbers of a run as one JSON object a line, on any disk or object store."""

from __future__ import annotations

import errno
import json
import logging
import math
import os
import time
from collections.abc import Iterable, Mapping
from typing import Any, BinaryIO

import numpy as np
from etils import epath
from jaxtyping import UInt8

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote, write_whole

METRICS_FILE = "metrics.jsonl"
Scalars = Mapping[str, float]
Images = Mapping[str, UInt8[np.ndarray, "height width 3"]]
Texts = Mapping[str, str]

# JSON has no literal for these three, and Python's own `NaN` breaks every strict reader (jq,
# browsers, pandas). They are written as strings, which `read_metrics` turns back.
_NONFINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
# A full disk, and a full quota.
_FULL = (errno.ENOSPC, errno.EDQUOT)
_log = logging.getLogger("vlp_jax.observe")
_RESERVED = ("step", "time", "texts")


class JsonlWriter:
    """One JSON object a line: `{"step": 12, "time": 1700000000.5, "train/loss": 2.25}`.

    `time` is in Unix seconds. Floats come back bit for bit; NaN and the infinities are the strings
    "nan", "inf" and "-inf". Texts are `{"step": ..., "time": ..., "texts": {name: text}}`; images
    are left to the other writers.

    On a local disk every line reaches the operating system before the call returns. Object stores
    (gs://, s3://) cannot append: there the file is uploaded whole, at most every `upload_seconds`,
    and on `flush` and `close`.

    Args:
        path: the file; its folder is made.
        start_step: records of this and later steps are removed, as is a torn last line.

    Raises:
        UserError: a line before the last is not a JSON object with a step.
    """

    def __init__(self, path: epath.PathLike, start_step: int = 0, upload_seconds: float = 30.0):
        path = epath.Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _remove_from_step(path, start_step)
        if is_remote(path):
            self._lines: _LocalLines | _RemoteLines = _RemoteLines(path, kept, upload_seconds)
        else:
            self._lines = _LocalLines(path)

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        """Appends one line; values may be Python, NumPy or (fetched) JAX scalars."""
        for name in _RESERVED:
            if name in scalars:
                raise ValueError(f"a metric cannot be named {name!r}")
        self._append(step, {name: _encode_float(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Images) -> None:
        del step, images

    def write_text(self, step: int, texts: Texts) -> None:
        self._append(step, {"texts": dict(texts)})

    def flush(self) -> None:
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()

    def _append(self, step: int, fields: Mapping[str, Any]) -> None:
        record = {"step": int(step), "time": time.time(), **fields}
        self._lines.append(json.dumps(record, allow_nan=False).encode() + b"\n")


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
    """Reads the records of a metrics.jsonl, floats as such; UserError for none or a broken one."""
    path = epath.Path(path)
    if not path.exists():
        raise UserError(f"no metrics in {path}: the file does not exist; check the workdir")
    return [
        {k: _NONFINITE.get(v, v) if isinstance(v, str) else v for k, v in record.items()}
        for _, record in _parse_lines(path, path.read_bytes())
    ]


class _LocalLines:
    """Hands each line to the operating system at once, or keeps it while the disk is full."""

    def __init__(self, path: epath.Path):
        self._file: BinaryIO = open(os.fspath(path), "ab", buffering=0)
        self._waiting = bytearray()

    def append(self, line: bytes) -> None:
        before = bool(self._waiting)
        self._waiting += line
        try:
            # An unbuffered write may take only a part of what it is given.
            while self._waiting:
                del self._waiting[: self._file.write(self._waiting)]
        except OSError as error:
            if error.errno not in _FULL:
                raise
            if not before:
                _log.warning(
                    "metrics wait in memory until they can be written: %s: %s",
                    *(self._file.name, error.strerror),
                )

    def flush(self) -> None:
        self.append(b"")
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            if error.errno not in _FULL:
                raise

    def close(self) -> None:
        self.append(b"")
        if self._waiting:
            _log.warning("%d bytes of metrics were lost: the disk is full", len(self._waiting))
        self._file.close()


class _RemoteLines:
    """Keeps all lines in memory and uploads them whole, now and then."""

    def __init__(self, path: epath.Path, kept: Iterable[bytes], upload_seconds: float):
        self._path = path
        self._lines = list(kept)
        self._upload_seconds = upload_seconds
        self._uploaded_lines = len(self._lines)
        self._uploaded_at = time.monotonic()

    def append(self, line: bytes) -> None:
        self._lines.append(line)
        if time.monotonic() - self._uploaded_at >= self._upload_seconds:
            self.flush()

    def flush(self) -> None:
        if len(self._lines) > self._uploaded_lines:
            self._path.write_bytes(b"".join(self._lines))
            self._uploaded_lines = len(self._lines)
            self._uploaded_at = time.monotonic()

    def close(self) -> None:
        self.flush()


def _remove_from_step(path: epath.Path, start_step: int) -> list[bytes]:
    """Removes records of steps >= start_step and a torn last line; returns the lines kept."""
    if not path.exists():
        return []
    data = path.read_bytes()
    kept = [line for line, record in _parse_lines(path, data) if record["step"] < start_step]
    if b"".join(kept) != data:
        write_whole(path, b"".join(kept))
    return kept


def _parse_lines(path: epath.Path, data: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """Splits into (line with its newline, record) pairs, without a torn last line."""
    lines = data.splitlines(keepends=True)
    parsed = []
    for number, line in enumerate(lines, start=1):
        record = _parse_record(line)
        if record is not None:
            parsed.append((line, record))
        elif number < len(lines):
            raise UserError(
                f"{path} line {number} is not a metrics record: mend or delete that line"
            )
    return parsed


def _parse_record(line: bytes) -> dict[str, Any] | None:
    """Reads the record of a line; None where the line is not whole."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    whole = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if whole and line.endswith(b"\n") else None


def _encode_float(value: Any) -> float | str:
    value = float(value)
    return value if math.isfinite(value) else str(value)

"""Inputs of the preparation: captioned images, read as training reads them (`data.sources`)."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from vlp_jax.data import faults, files
from vlp_jax.data.prepare import paths
from vlp_jax.data.prepare.examples import (
    CAPTIONS,
    IMAGE,
    BadExample,
    Candidate,
    Reference,
    SkippedExample,
    clean_captions,
    clean_value,
    decode_text,
)
from vlp_jax.data.sources.caption_files import CAPTION_FIELDS
from vlp_jax.data.sources.folder import FolderSource
from vlp_jax.data.sources.parquet import ParquetSource
from vlp_jax.data.sources.row_source import RowSource
from vlp_jax.data.sources.webdataset import IMAGE_EXTENSIONS, SUFFIXES, WebDatasetSource
from vlp_jax.errors import UserError, unknown_key_message

FOLDER, WEBDATASET, PARQUET = "folder", "webdataset", "parquet"
FORMATS = (FOLDER, WEBDATASET, PARQUET)
LABEL = "label"
_SUFFIXES = {WEBDATASET: SUFFIXES, PARQUET: (".parquet",)}
# Fields that are read if the command line names no other; of several the first that there is.
_ALL_IMAGES = ",".join(IMAGE_EXTENSIONS)
_USUAL = {
    WEBDATASET: {IMAGE: (_ALL_IMAGES,), CAPTIONS: ("txt",)},
    PARQUET: {IMAGE: ("image", "jpg"), CAPTIONS: CAPTION_FIELDS},
}
_ROWS = 32  # examples that are read at a time
_FOLDER_ROWS = 1000  # examples of a folder in a unit
_USUAL_BYTES = 65_536  # of an example, for the estimate
_REQUESTS = 16  # sizes of remote files that are asked for at a time
# Keys of a data config, as messages of sources name them, and the options that stand for them here.
_OPTIONS = {
    "data.image_field": "--fields image",
    "data.caption_field": "--fields text",
    "data.label_field": "--fields label",
    "data.fields.": "--fields ",
    "data.columns": "--fields",
    "data.captions": "--input",
    "data.path": "--input",
}


@dataclass(frozen=True)
class Unit:
    """The part of the input that a worker reads in one go: a file, or rows of a caption file."""

    number: int
    path: str
    begin: int = 0
    end: int | None = None


@dataclass(frozen=True)
class Input:
    """Files of one format, and the fields that are read. It is pickled to the workers.

    An id is the path in a folder, TAR/KEY, or FILE#ROW, below the folder of all files.

    Attributes:
      files: (path, size in bytes) of each file, sorted; of a folder its caption file.
      fields: output field -> column, or extensions or "json.KEY" in a tar.
      token: makes inputs of different runs differ, whose files may have changed in between.
    """

    format: str
    files: tuple[tuple[str, int], ...]
    fields: tuple[tuple[str, str], ...]
    token: str

    @classmethod
    def open(cls, format: str, patterns: Sequence[str], fields: Mapping[str, str]) -> Input:
        """Looks for the files of `patterns` (see `files.expand`) and for the fields.

        Raises UserError if a pattern matches nothing, or there is no such field.
        """
        token = uuid.uuid4().hex
        with _options_in_messages():
            if format == FOLDER:
                return _open_folder(patterns, fields, token)
            inner = [paths.absolute(pattern) for pattern in patterns]
            found = files.expand(inner, _SUFFIXES[format])
            # Sizes tell a later run whether the files have changed.
            with ThreadPoolExecutor(_REQUESTS) as pool:
                sizes = list(pool.map(paths.size_of, found))
            missing = [path for path, size in zip(found, sizes, strict=True) if size is None]
            if missing:
                raise UserError(f"--input: {len(missing)} files are not there: {missing[0]}")
            chosen = _choose_fields(format, found, fields)
            listed = tuple(zip(found, sizes, strict=True))
            return cls(format, listed, tuple(chosen.items()), token)

    def extra_fields(self) -> list[str]:
        return [name for name, _ in self.fields if name not in (IMAGE, CAPTIONS)]

    def estimated_examples(self) -> int:
        if self.format == FOLDER:
            return len(_folder(self))
        return sum(size for _, size in self.files) // _USUAL_BYTES

    def source(self) -> dict[str, Any]:
        """The part of the manifest that says what is read; the same while the input is the same."""
        listed: list[dict[str, Any]] = [{"path": path, "bytes": size} for path, size in self.files]
        found: dict[str, Any] = {"files": listed, "fields": dict(self.fields)}
        if self.format == FOLDER:
            with open(self.files[0][0], "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            found["files"] = [{"path": self.files[0][0], "sha256": digest}]
            names = _folder(self).class_names(LABEL)
            found |= {} if names is None else {"class_names": {LABEL: list(names)}}
        return found

    def units(self) -> list[Unit]:
        if self.format != FOLDER:
            return [Unit(number, path) for number, (path, _) in enumerate(self.files)]
        size = len(_folder(self))
        begins = range(0, size, _FOLDER_ROWS)
        path = self.files[0][0]
        return [Unit(n, path, b, min(b + _FOLDER_ROWS, size)) for n, b in enumerate(begins)]

    def scan(self, unit: Unit) -> Iterator[Candidate | SkippedExample]:
        """Yields the examples of a unit in their order, or why they cannot be used."""
        if self.format == FOLDER:
            yield from self._scan(_folder(self), unit, cut=False)
            return
        # Indexes, and copies of remote and compressed files, are of no use after the unit.
        with TemporaryDirectory(prefix="prepare_data_") as cache:
            try:
                source = _source(self.format, unit.path, cache)
                cut = not source.shards.is_whole(0)
            except UserError as error:  # nothing of the file can be read
                yield SkippedExample(faults.TRUNCATED, unit.path, str(error), ends_file=True)
                return
            yield from self._scan(source, unit, cut)

    def _scan(
        self, source: RowSource, unit: Unit, cut: bool
    ) -> Iterator[Candidate | SkippedExample]:
        """Yields the examples of a unit; see `scan`.

        If the end of the file is missing (`cut`), its last fault says that it ends there.
        """
        names = {out: self._name(out, name) for out, name in self.fields}
        id_field = {FOLDER: "path", WEBDATASET: "id"}.get(self.format)
        wanted = list(dict.fromkeys([*names.values(), *filter(None, [id_field])]))
        end, last = len(source) if unit.end is None else unit.end, b""
        for begin in range(unit.begin, end, _ROWS):
            indices = np.arange(begin, min(begin + _ROWS, end))
            rows, found = source.rows(indices, wanted)
            for number, index in enumerate(indices.tolist()):
                where, last = source.describe(index), found[number]
                if last:
                    reason, detail = faults.explain(last.decode())
                    # The index of a cut file ends in the example within which it was cut.
                    ends = cut and index == end - 1
                    yield SkippedExample(faults.TRUNCATED if ends else reason, where, detail, ends)
                    continue
                row = {name: rows[name][number] for name in wanted}
                key = str(index) if id_field is None else row[id_field].decode("utf-8", "replace")
                try:
                    yield self._candidate(source, index, self._id(unit, key), row, names)
                except BadExample as bad:
                    yield SkippedExample(bad.reason, where, bad.detail)
        if cut and not last:
            detail = f"the file ends after {end} examples without the mark of its end"
            yield SkippedExample(faults.TRUNCATED, unit.path, detail, ends_file=True)

    def _name(self, out: str, name: str) -> str:
        if self.format == FOLDER:
            return out if out in (IMAGE, CAPTIONS, LABEL) else name
        # The source refuses a sample with images of several endings if nobody chose among them.
        return IMAGE if self.format == WEBDATASET and name == _ALL_IMAGES else name

    def _id(self, unit: Unit, key: str) -> str:
        if self.format == FOLDER:
            return key
        # Below the folder of all files, so that a data set keeps its ids when it is moved.
        root = paths.common_folder([path for path, _ in self.files])
        stem = unit.path[len(root) :].lstrip("/")
        for suffix in _SUFFIXES[self.format]:
            stem = stem.removesuffix(suffix)
        return f"{stem}{'/' if self.format == WEBDATASET else '#'}{key}"

    def _candidate(
        self,
        source: RowSource,
        index: int,
        id: str,
        row: Mapping[str, Any],
        names: Mapping[str, str],
    ) -> Candidate:
        image = row[names[IMAGE]]
        if image is None:
            raise BadExample(faults.MISSING_FIELD, f"no bytes in {names[IMAGE]!r}")
        if not isinstance(image, bytes):
            raise BadExample(faults.UNREADABLE, f"{names[IMAGE]!r} holds no bytes")
        captions = clean_captions(row[names[CAPTIONS]])
        fields = {}
        for out in self.extra_fields():
            value = row[names[out]]
            if source.is_text(names[out]):
                several = isinstance(value, list)
                texts = [
                    decode_text(item, out) if isinstance(item, bytes) else item
                    for item in (value if several else [value])
                ]
                value = texts if several else texts[0]
            fields[out] = clean_value(out, value)
        path, offset = source.place(index, names[IMAGE]) or (None, 0)
        reference = Reference(id, path, offset, len(image), captions, fields)
        return Candidate(reference, source.describe(index), image)


def _open_folder(patterns: Sequence[str], fields: Mapping[str, str], token: str) -> Input:
    if len(patterns) != 1 or not paths.is_local(patterns[0]):
        raise UserError(
            "--input-format folder reads one folder on a mounted disk, or one caption file in it, "
            f"not {' '.join(patterns)}"
        )
    path = paths.absolute(patterns[0])
    folder, name = (path, None) if os.path.isdir(path) else os.path.split(path)
    if name is not None and not os.path.isfile(path):
        raise UserError(f"--input {path}: there is no such folder or file")
    source = _folder_source(folder, name, fields)
    if source.file.is_dir():
        raise UserError(f"--input {path} has no caption file, which a preparation needs")
    columns = {IMAGE: source.listed.image_column, CAPTIONS: source.listed.caption_column, **fields}
    file = str(source.file)
    return Input(FOLDER, ((file, os.path.getsize(file)),), tuple(columns.items()), token)


def _folder_source(folder: str, name: str | None, fields: Mapping[str, str]) -> FolderSource:
    return FolderSource(
        path=folder,
        captions=name,
        image_field=fields.get(IMAGE),
        caption_field=fields.get(CAPTIONS),
        label_field=fields.get(LABEL),
        columns=tuple(c for out, c in fields.items() if out not in (IMAGE, CAPTIONS, LABEL)),
        split="all",
        max_bad_fraction=1.0,
    )


@functools.lru_cache(maxsize=2)  # a worker reads many units of one caption file
def _folder(input: Input) -> FolderSource:
    return _folder_source(*os.path.split(input.files[0][0]), dict(input.fields))


def _source(format: str, path: str, cache: str) -> WebDatasetSource | ParquetSource:
    if format == WEBDATASET:
        return WebDatasetSource(path, cache_dir=cache)
    return ParquetSource(path, cache_mib=1, cache_dir=cache)  # read in order: one row group is kept


def _choose_fields(format: str, found: Sequence[str], fields: Mapping[str, str]) -> dict[str, str]:
    """Maps output fields to fields of the source, by the first file that can be read."""
    failure: UserError | None = None
    for path in found:
        with TemporaryDirectory(prefix="prepare_data_") as cache:
            try:
                source = _source(format, path, cache)
                source.fields()
            except UserError as error:
                failure = failure or error
                continue
            usual = _USUAL[format]
            chosen = {
                out: _usual(source, out, names) for out, names in usual.items() if out not in fields
            }
            for out, name in fields.items():
                if not source.can_read(name):
                    why = source.look_for(name)
                    known = unknown_key_message(name, source.fields(), "the input's fields")
                    raise UserError(f"--fields {out}={name}: {why or known}")
            return {**chosen, **fields}
    assert failure is not None
    raise failure


def _usual(source: RowSource, out: str, names: Sequence[str]) -> str:
    for name in names:
        if source.can_read(name):
            return name
    why = next(filter(None, map(source.look_for, names)), "")
    known = ", ".join(source.fields())
    option = "text" if out == CAPTIONS else out
    raise UserError(
        f"no field named {', '.join(names)} (there are {known}): name one by --fields {option}="
        + (f"; {why}" if why else "")
    )


@contextlib.contextmanager
def _options_in_messages() -> Iterator[None]:
    """Names options instead of keys of a config in the messages of sources."""
    try:
        yield
    except UserError as error:
        message = str(error)
        for key, option in _OPTIONS.items():
            message = message.replace(f"{key}=", f"{option} ").replace(key, option)
        raise UserError(message) from None

"""Reading a list of image paths and captions from CSV, TSV or JSONL, and checking it."""

from __future__ import annotations

import csv
import json
import os
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError, unknown_key_message

SUFFIXES = (".csv", ".tsv", ".jsonl")
IMAGE_FIELDS = ("path", "file", "filename", "filepath", "file_name", "image")
CAPTION_FIELDS = ("caption", "captions", "text", "title")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image: `path` as hashed and shown, `file` as opened, captions, and a class name."""

    path: str
    file: str
    captions: tuple[str, ...]
    label: str | None


def find_caption_file(root: Path, name: str | None) -> Path:
    """The caption file of a folder: the one named, or the only one of a known format.

    Raises:
      UserError: if there is none, more than one, or one of an unknown format.
    """
    if name is not None:
        file = root / name
        if not file.is_file():
            raise UserError(f"data.captions={name!r}: there is no file {file}")
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"caption file {file} must end in {', '.join(SUFFIXES)}")
        return file
    found = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{root} has no caption file: put a {', '.join(SUFFIXES)} file into it")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{root} has several caption files ({names}): choose one by data.captions")
    return found[0]


def read_entries(
    root: Path,
    file: Path,
    image_field: str | None,
    caption_field: str | None,
    label_field: str | None,
) -> list[Entry]:
    """The images that a caption file lists, in its order, rows of one image merged.

    Raises:
      UserError: as `FolderSource` says.
    """
    captions: dict[str, list[str]] = {}
    labels: dict[str, str] = {}
    columns: tuple[str, str] | None = None
    for where, row in rows(file):
        if columns is None:
            columns = (
                choose_column(row, image_field, IMAGE_FIELDS, "data.image_field", file),
                choose_column(row, caption_field, CAPTION_FIELDS, "data.caption_field", file),
            )
            if label_field is not None:
                choose_column(row, label_field, (), "data.label_field", file)
        path = _text(row.get(columns[0]), where, columns[0])
        path = normal_path(os.path.relpath(path, root) if os.path.isabs(path) else path)
        captions.setdefault(path, []).extend(_captions(row.get(columns[1]), where, columns[1]))
        if label_field is not None:
            label = _text(row.get(label_field), where, label_field)
            if labels.setdefault(path, label) != label:
                raise UserError(f"{where}: {path} has label {label!r} but had {labels[path]!r}")
    if not captions:
        raise UserError(f"caption file {file} has no rows")
    files = _locate(root, captions, file)
    return [Entry(p, files[p], tuple(texts), labels.get(p)) for p, texts in captions.items()]


def rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The rows of a caption file, each with its file and line number for messages."""
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            if file.suffix.lower() == ".jsonl":
                yield from _json_rows(file, stream)
            else:
                yield from _csv_rows(file, stream)
    except UnicodeDecodeError as error:
        raise UserError(f"caption file {file} is not UTF-8: {error.reason}; convert it") from None


def _csv_rows(file: Path, stream: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if file.suffix.lower() == ".tsv" else ","
    reader = csv.DictReader(stream, delimiter=delimiter, strict=True)
    try:
        for row in reader:
            yield f"{file}, line {reader.line_num}", row
    except csv.Error as error:
        # DictReader's own count stops at the last row that was well formed.
        line = reader.reader.line_num
        raise UserError(f"{file}, line {line}: malformed row: {error}") from None


def _json_rows(file: Path, stream: Iterable[str]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(stream, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {number}: malformed JSON: {error.msg}") from None
        if not isinstance(row, dict):
            raise UserError(f"{file}, line {number}: a line must be an object like {{...}}")
        yield f"{file}, line {number}", row


def choose_column(
    row: Mapping[str, Any], name: str | None, usual: tuple[str, ...], key: str, file: Path
) -> str:
    """The column to read: `name` if given, else the first of the `usual` ones that exists."""
    columns = [column for column in row if column]
    if name is not None:
        if name not in columns:
            raise UserError(f"{key}: {unknown_key_message(name, columns, str(file))}")
        return name
    for column in (c for candidate in usual for c in columns if c.lower() == candidate):
        return column
    raise UserError(
        f"{file} has no column named {', '.join(usual)} (its columns: {', '.join(columns)}); "
        f"name one by {key}"
    )


def _text(value: Any, where: str, column: str) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: {column!r} is empty or not a string")
    # JSON can spell half of a surrogate pair, which no encoder takes.
    return value.strip().encode("utf-8", "replace").decode()


def _captions(value: Any, where: str, column: str) -> list[str]:
    values = value if isinstance(value, list) else [value]
    if not values:
        raise UserError(f"{where}: {column!r} is an empty list")
    return [_text(item, where, column) for item in values]


def normal_path(path: str) -> str:
    """A path with forward slashes, no "./" and composed accents, as macOS and Windows differ."""
    path = os.path.normpath(path.replace("\\", "/")).replace(os.sep, "/")
    return unicodedata.normalize("NFC", path)


def _locate(root: Path, paths: Iterable[str], file: Path) -> dict[str, str]:
    """Path as written -> file to open, by one walk of the folder instead of a look at each."""
    present = dict(walk(str(root), ""))
    found: dict[str, str] = {}
    missing: list[str] = []
    for path in paths:
        outside = os.path.join(root, path)
        if path in present:
            found[path] = present[path]
        elif os.path.isfile(outside):
            found[path] = outside
        else:
            missing.append(path)
    if missing:
        raise UserError(
            f"{len(missing)} of {len(missing) + len(found)} images that {file} lists are not in "
            f"{root}; the first is {missing[0]!r}"
        )
    return found


def walk(folder: str, prefix: str) -> Iterator[tuple[str, str]]:
    """(normal path below the first folder, path to open) of all files below `folder`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield unicodedata.normalize("NFC", prefix + entry.name), entry.path

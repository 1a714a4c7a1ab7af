"""Caption files: CSV, TSV or JSONL lists of images with captions and labels."""

from __future__ import annotations

import logging
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlp_jax.data.faults import EMPTY_TEXT, MISSING_FIELD, UNREADABLE, marked
from vlp_jax.data.sources.labels import label_text
from vlp_jax.data.sources.tables import IMAGE_FILE, SUFFIXES, choose_column, rows
from vlp_jax.errors import UserError

# The last of each is Flickr30k's.
IMAGE_FIELDS = ("path", "file", "filename", "filepath", "file_name", "image", "image_name")
CAPTION_FIELDS = ("caption", "captions", "text", "title", "comment")
_NOTHING: Mapping[str, Any] = {}  # shared by all entries, to save memory
_log = logging.getLogger("vlp_jax.data")


@dataclass(frozen=True, slots=True)
class Entry:
    """One image that a file lists.

    Attributes:
      path, file: relative to the folder, as hashed and shown, and as opened.
      captions: none of them empty.
      label: as `labels.label_text` gives it; None if there is none.
      faults: field -> why it cannot be had, as `faults.marked` says it.
    """

    path: str
    file: str
    captions: tuple[str, ...]
    label: str | None
    columns: Mapping[str, Any]
    faults: Mapping[str, bytes]


@dataclass(frozen=True)
class CaptionFile:
    """The content of a caption file.

    Attributes:
      entries: the images in the order of the file, rows of one image merged.
      labels: each label that occurs, with the place of its first for messages.
    """

    entries: list[Entry]
    labels: Mapping[str, str]
    image_column: str
    caption_column: str


def find_caption_file(root: Path, name: str | None) -> Path:
    """The caption file of a folder, named or the only one; the folder if it holds classes."""
    if name is not None:
        file = root / name
        if not file.is_file():
            raise UserError(f"data.captions={name!r}: there is no file {file}")
        if file.suffix.lower() not in SUFFIXES:
            raise UserError(f"caption file {file} must end in {', '.join(SUFFIXES)}")
        return file
    found = sorted(p for p in root.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found and any(_class_images(root)):
        return root
    if not found:
        raise UserError(
            f"{root} has no caption file: put a {', '.join(SUFFIXES)} file into it, or the images "
            "of each class into a folder with its name"
        )
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{root} has several caption files ({names}): choose one by data.captions")
    return found[0]


def _class_images(root: Path) -> Iterator[tuple[str, str]]:
    """Yields (path, file to open) of the images in the folders of `root`."""
    return ((p, file) for p, file in walk(str(root), "") if "/" in p and IMAGE_FILE.search(p))


def read_class_folders(root: Path) -> CaptionFile:
    """Lists the images of a folder with a folder for each class (torchvision's ImageFolder).

    The caption of an image is the name of its class, with spaces for underscores.
    """
    found = [(path, file, path.partition("/")[0]) for path, file in sorted(_class_images(root))]
    entries = [
        Entry(path, file, (label.replace("_", " "),), label, _NOTHING, _NOTHING)
        for path, file, label in found
    ]
    return CaptionFile(entries, {label: str(root / label) for *_, label in found}, "", "")


def read_entries(
    root: Path,
    file: Path,
    image_field: str | None,
    caption_field: str | None,
    label_field: str | None,
    further: Sequence[str] = (),
) -> CaptionFile:
    """Reads a caption file in the folder `root`, and looks which of its images are there.

    Args:
      image_field, caption_field: columns; None takes the first of the usual ones.
      label_field: a column; None for no labels.
      further: columns to keep.

    Raises:
      UserError: as `tables.rows`, and for columns that are not there, labels or further columns of
        an image that disagree, or a file without rows.
    """
    found = _Listed()
    columns: tuple[str, str] | None = None
    for where, row in rows(file):
        if columns is None:
            columns = (
                choose_column(row, image_field, IMAGE_FIELDS, "data.image_field", file),
                choose_column(row, caption_field, CAPTION_FIELDS, "data.caption_field", file),
            )
            if label_field is not None:
                choose_column(row, label_field, (), "data.label_field", file)
            for name in further:
                choose_column(row, name, (), "data.columns", file)
        path = _caption(row.get(columns[0]))[0]
        if path:
            path = normal_path(os.path.relpath(path, root) if os.path.isabs(path) else path)
        label = None if label_field is None else label_text(row.get(label_field))
        columns_of = {name: row.get(name) for name in further}
        found.add(where, path, row.get(columns[1]), label, columns_of)
    if columns is None:
        raise UserError(f"caption file {file} has no rows")
    return CaptionFile(found.entries(root, file, label_field), found.places, *columns)


class _Listed:
    """Rows of a caption file, by the image that they are of."""

    def __init__(self) -> None:
        self.places: dict[str, str] = {}  # label -> where it occurs first
        self._captions: dict[str, list[str]] = {}
        self._labels: dict[str, str] = {}
        self._columns: dict[str, Mapping[str, Any]] = {}
        self._wrong: dict[str, tuple[str, str]] = {}  # image -> what its first bad caption is
        self._nameless: set[str] = set()

    def add(
        self, where: str, path: str, captions: Any, label: str | None, columns: Mapping[str, Any]
    ) -> None:
        if not path:
            path = where  # the row counts as an example that cannot be used
            self._nameless.add(path)
        known = self._captions.setdefault(path, [])
        for value in captions if isinstance(captions, list) and captions else [captions]:
            text, reason = _caption(value)
            if text:
                known.append(text)
            else:
                self._wrong.setdefault(path, (reason, where))
        if columns and self._columns.setdefault(path, columns) != columns:
            raise UserError(f"{where}: {path} has {columns} but had {self._columns[path]}")
        if label is None:
            return
        self.places.setdefault(label, where)
        if self._labels.setdefault(path, label) != label:
            raise UserError(f"{where}: {path} has label {label!r} but had {self._labels[path]!r}")

    def entries(self, root: Path, file: Path, label_field: str | None) -> list[Entry]:
        files = _locate(root, self._captions)
        entries = []
        for path, captions in self._captions.items():
            faults = {}
            if path in self._nameless:
                nameless = marked(MISSING_FIELD, f"{path}: it names no image")
                faults = {"image": nameless, "path": nameless}
            elif path not in files:
                faults["image"] = marked(MISSING_FIELD, "there is no such file")
            if not captions:
                reason, where = self._wrong[path]
                faults["captions"] = marked(reason, f"{where}: it has no caption")
            label = self._labels.get(path)
            if label_field is not None and label is None:
                faults["label"] = marked(MISSING_FIELD, f"{file} gives it no {label_field!r}")
            opened = path if path in self._nameless else files.get(path, os.path.join(root, path))
            columns = self._columns.get(path, _NOTHING)
            entries.append(Entry(path, opened, tuple(captions), label, columns, faults or _NOTHING))
        left_out = [place for path, (_, place) in self._wrong.items() if self._captions[path]]
        if left_out:
            _log.warning(
                "captions left out of %d images of %s that have others, because they are empty or "
                "no text; the first is in %s",
                *(len(left_out), file, left_out[0]),
            )
        return entries


def _caption(value: Any) -> tuple[str, str]:
    """Cleans a caption: (text, "") or ("", one of `faults.REASONS`)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and value == value:
        value = str(value)
    if value is not None and value == value and not isinstance(value, str):
        return "", UNREADABLE
    # JSON can spell half of a surrogate pair, which no encoder takes.
    text = value.strip().encode("utf-8", "replace").decode() if isinstance(value, str) else ""
    return text, "" if text else EMPTY_TEXT


def normal_path(path: str) -> str:
    """A path with forward slashes, no "./" and composed accents, as macOS and Windows differ."""
    path = os.path.normpath(path.replace("\\", "/")).replace(os.sep, "/")
    return unicodedata.normalize("NFC", path)


def _locate(root: Path, paths: Iterable[str]) -> dict[str, str]:
    """Finds the file to open for each path as written."""
    # On a network disk a look at each of a million paths takes hours, a walk minutes.
    present = dict(walk(str(root), ""))
    found: dict[str, str] = {}
    for path in paths:
        outside = os.path.join(root, path)
        if path in present:
            found[path] = present[path]
        elif os.path.isfile(outside):
            found[path] = outside
    return found


def walk(folder: str, prefix: str) -> Iterator[tuple[str, str]]:
    """Yields (normal path below the first folder, path to open) of all files below `folder`."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from walk(entry.path, f"{prefix}{entry.name}/")
            elif entry.is_file():
                yield unicodedata.normalize("NFC", prefix + entry.name), entry.path

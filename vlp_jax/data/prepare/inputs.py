"""What the preparation reads: the interface of an input, and folders with caption files."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from vlp_jax.data.faults import MISSING_FIELD, UNREADABLE
from vlp_jax.data.prepare import paths
from vlp_jax.data.prepare.examples import (
    CAPTIONS,
    IMAGE,
    BadExample,
    Candidate,
    Fault,
    clean_captions,
    clean_value,
)
from vlp_jax.data.prepare.images import HEAD_BYTES
from vlp_jax.data.sources.caption_files import CAPTION_FIELDS, IMAGE_FIELDS, normal_path, walk
from vlp_jax.data.sources.labels import label_text, number_labels
from vlp_jax.data.sources.tables import SUFFIXES, choose_column, rows
from vlp_jax.errors import UserError

LABEL = "label"
_CHUNK = 1000  # images of a folder that one worker looks at in one go


@dataclass(frozen=True)
class Unit:
    """A part of the input that one worker reads in one go: a file."""

    number: int
    path: str


class Input(Protocol):
    """One input format. It is pickled to the workers, which call `scan`."""

    def units(self, work: str) -> list[Unit]:
        """The parts of the input; what workers cannot find themselves is written below `work`."""
        ...

    def source(self) -> dict[str, Any]:
        """What is read, resolved, for the manifest: JSON, the same while the input is the same."""
        ...

    def estimated_examples(self) -> int:
        """Roughly how many examples there are."""
        ...

    def extra_fields(self) -> list[str]:
        """The output fields besides id, image and captions."""
        ...

    def scan(self, unit: Unit, whole: bool) -> Iterator[Candidate | Fault]:
        """The examples of a unit, in its order; with `whole`, `Candidate.data` is all bytes."""
        ...


@dataclass(frozen=True)
class FolderInput:
    """Image files, and a CSV, TSV or JSONL file of paths and captions, read as `FolderSource` does.

    The id is the path relative to the folder of the caption file. Rows of one image are one example
    with several captions. `label` becomes the number of its class, in the order of `FolderSource`.

    Attributes:
      file: the caption file, on a mounted disk.
      columns: output field -> column.
    """

    file: str
    columns: Mapping[str, str]

    @staticmethod
    def open(patterns: Sequence[str], fields: Mapping[str, str]) -> FolderInput:
        """The input that one folder, or one caption file, is.

        Raises:
          UserError: if there is no such folder or file, or no such column.
        """
        if len(patterns) != 1 or not paths.is_local(patterns[0]):
            raise UserError(
                "--input-format folder reads one folder on a mounted disk, or one caption file in "
                f"it, not {' '.join(patterns)}"
            )
        file = _caption_file(Path(paths.absolute(patterns[0])))
        _, row = next(iter(rows(file)), (None, None))
        if row is None:
            raise UserError(f"caption file {file} has no rows")
        columns = {
            IMAGE: choose_column(row, fields.get(IMAGE), IMAGE_FIELDS, "--fields image", file),
            CAPTIONS: choose_column(
                row, fields.get(CAPTIONS), CAPTION_FIELDS, "--fields text", file
            ),
        }
        for name in [name for name in fields if name not in columns]:
            columns[name] = choose_column(row, fields[name], (), f"--fields {name}", file)
        return FolderInput(str(file), columns)

    def extra_fields(self) -> list[str]:
        return [name for name in self.columns if name not in (IMAGE, CAPTIONS)]

    def estimated_examples(self) -> int:
        with open(self.file, "rb") as stream:
            return sum(1 for _ in stream)

    def source(self) -> dict[str, Any]:
        with open(self.file, "rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        source = {"files": [{"path": self.file, "sha256": digest}], "fields": dict(self.columns)}
        names = self._classes()[1] if LABEL in self.columns else None
        if names is not None:
            source["class_names"] = {LABEL: list(names)}
        return source

    def _classes(self) -> tuple[dict[str, int], tuple[str, ...] | None]:
        """The number of each label, and the names of the classes if the labels are words."""
        places: dict[str, str] = {}
        for where, row in rows(Path(self.file)):
            label = label_text(row.get(self.columns[LABEL]))
            if label is not None:
                places.setdefault(label, where)
        return number_labels(places, None, "a column of names alone")

    def units(self, work: str) -> list[Unit]:
        root = os.path.dirname(self.file)
        present = dict(walk(root, ""))
        lines: list[str] = []
        images: dict[str, dict[str, Any]] = {}
        numbers = self._classes()[0] if LABEL in self.columns else {}
        for where, row in rows(Path(self.file)):
            path = str(row.get(self.columns[IMAGE]) or "").strip()
            if not path:
                lines.append(json.dumps({"where": where}))
                continue
            path = normal_path(os.path.relpath(path, root) if os.path.isabs(path) else path)
            captions = row.get(self.columns[CAPTIONS])
            captions = captions if isinstance(captions, list) else [captions or ""]
            fields = {name: row.get(self.columns[name]) for name in self.extra_fields()}
            if LABEL in fields:
                fields[LABEL] = numbers.get(label_text(fields[LABEL]) or "")
            image = images.setdefault(path, {"where": where, "captions": [], "fields": fields})
            if image["fields"] != fields:
                raise UserError(f"{where}: {path} has {fields} but had {image['fields']}")
            image["captions"] += captions
        for path, image in images.items():
            image |= {"id": path, "file": present.get(path, os.path.join(root, path))}
            lines.append(json.dumps(image))
        units = []
        for number, start in enumerate(range(0, len(lines), _CHUNK)):
            units.append(Unit(number, paths.join(work, "units", f"{number:05d}.jsonl")))
            content = "\n".join(lines[start : start + _CHUNK])
            paths.write_bytes(units[-1].path, content.encode())
        return units

    def scan(self, unit: Unit, whole: bool) -> Iterator[Candidate | Fault]:
        for line in paths.read_bytes(unit.path).decode().split("\n"):
            listed = json.loads(line)
            try:
                yield _listed_image(listed, whole)
            except BadExample as bad:
                yield Fault(bad.reason, listed["where"], bad.detail)


def _listed_image(listed: Mapping[str, Any], whole: bool) -> Candidate:
    if "id" not in listed:
        raise BadExample(MISSING_FIELD, "no path of an image")
    captions = clean_captions(listed["captions"])
    fields = {name: clean_value(name, value) for name, value in listed["fields"].items()}
    file = listed["file"]
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = stream.read(size if whole else HEAD_BYTES)
    except FileNotFoundError:
        raise BadExample(MISSING_FIELD, f"there is no file {file}") from None
    except OSError as error:
        raise BadExample(UNREADABLE, f"{file}: {error.strerror}") from None
    return Candidate(listed["id"], file, file, 0, size, data, captions, fields)


def _caption_file(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"caption file {path} must end in {', '.join(SUFFIXES)}")
        return path
    if not path.is_dir():
        raise UserError(f"--input {path}: there is no such folder or file")
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())
    if not found:
        raise UserError(f"{path} has no caption file: put a {', '.join(SUFFIXES)} file into it")
    if len(found) > 1:
        names = ", ".join(p.name for p in found)
        raise UserError(f"{path} has several caption files ({names}): give one of them as --input")
    return found[0]


def listed_files(files: Sequence[tuple[str, int]]) -> list[dict[str, Any]]:
    """(path, size) pairs for the manifest."""
    return [{"path": path, "bytes": size} for path, size in files]


def relative_stem(path: str, root: str, suffix: str) -> str:
    """What ids of a file's examples begin with: its path below `root` without its ending."""
    return path[len(root) :].lstrip("/").removesuffix(suffix)

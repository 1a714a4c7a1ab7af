"""A folder of images with a CSV, TSV or JSONL file of paths and captions, or one a class."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.faults import FEWEST, MAX_BAD_FRACTION, check_fraction
from vlp_jax.data.files import retrying
from vlp_jax.data.sources.base import STRING, STRINGS, FieldSpec
from vlp_jax.data.sources.caption_files import (
    CaptionFile,
    Entry,
    find_caption_file,
    read_class_folders,
    read_entries,
)
from vlp_jax.data.sources.labels import number_labels, open_names
from vlp_jax.data.sources.records import empty_strings
from vlp_jax.data.sources.row_source import Rows, RowSource, spec_of_all
from vlp_jax.errors import UserError

# Of one file: it is a bad example. Anything else is the disk's, and ends the run.
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError)
SPLITS = ("train", "validation", "all")
_WRONG_FOLDER = 0.5  # the share of images that are not there from which on nothing is read


@dataclass(frozen=True)
class FolderSource(RowSource):
    """Image files below a folder, and a file in it that lists their paths and captions.

    The fields are `image` (encoded bytes), `captions` (byte strings [k], k at least 1), `path`
    (relative to the folder, with forward slashes), with `label_field`, `label` (int64), and the
    further `columns` under their own names, of the type of the first value that is not empty. An
    image that several rows name is one example with several captions. An image that is not there,
    or that has no caption or no label, is an example that cannot be used (`faults`) wherever that
    field is asked for.

    Attributes:
      path: the folder. Without a caption file it holds a folder of images for each class.
      captions: the caption file, relative to the folder; None takes the only .csv, .tsv or .jsonl
        file in it. The first row of a CSV or TSV names the columns. See `tables.rows`.
      image_field: the column of paths; None takes the first that is there of
        `caption_files.IMAGE_FIELDS`. Paths are relative to the folder, with either slash.
      caption_field: the column of captions; None takes the first that is there of
        `caption_files.CAPTION_FIELDS`. In JSONL it may be a list.
      label_field: a column of classes, or None. Whole numbers mean what they say. Words are
        numbered by `label_names`, and without it in the alphabetical order of all of the file.
      columns: further columns to read.
      label_names: the names of all classes by number, or the path of a file with one a line.
      split: "train", "validation" or "all".
      holdout: the fraction of images in `validation`, chosen by a hash of their path, so that
        adding files moves none of the others.
      max_bad_fraction: see `FaultLog`. A list of which more cannot be used, or half, is refused.

    Raises:
      UserError: for a folder, file or column that is not there, a malformed line, labels that are
        no classes, too many images that are not there or have no caption, or a split without any
        that can be used.
    """

    path: str
    captions: str | None = None
    image_field: str | None = None
    caption_field: str | None = None
    label_field: str | None = None
    columns: Sequence[str] = ()
    label_names: Sequence[str] | str | None = None
    split: str = "train"
    holdout: float = 0.1
    max_bad_fraction: float = MAX_BAD_FRACTION

    def __post_init__(self) -> None:
        if not self.path or not self._root.is_dir():
            raise UserError(f"data.path={str(self.path)!r} is not a folder")
        if self.split not in SPLITS:
            raise UserError(f"data.split={self.split!r} is not one of {', '.join(SPLITS)}")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout} is not a fraction in [0, 1)")
        no_label = self.label_field is None and not self.file.is_dir()
        if self.label_names is not None and no_label:
            raise UserError("data.label_names is set, and data.label_field is not: name the column")
        check_fraction(self.max_bad_fraction)
        self._check_entries()
        if self.label_field is not None and not self.listed.labels:
            raise UserError(f"{self.file}: the column {self.label_field!r} holds no label")
        if all(_is_bad(entry) for entry in self._examples):
            total, chosen = len(self.listed.entries), len(self._examples)
            raise UserError(
                f"split {self.split!r} of {self.file} is empty: it lists {total} images, of which "
                f"{chosen} are in the split and none of them can be used, and data.holdout is "
                f"{self.holdout}"
            )
        _ = self._classes

    def _check_entries(self) -> None:
        """Raises UserError if the folder is the wrong one, or too much of the list is missing."""
        bad = [entry for entry in self.listed.entries if _is_bad(entry)]
        total, share = len(self.listed.entries), self.max_bad_fraction
        few = len(bad) <= share * max(total, FEWEST) and len(bad) < total
        if few and len(bad) <= max(share, _WRONG_FOLDER) * total:
            return
        missing = [entry.path for entry in bad if "image" in entry.faults]
        silent = [entry.path for entry in bad if "captions" in entry.faults]
        counts = []
        if missing:
            counts.append(
                f"{len(missing)} of {total} images that {self.file} lists are not in "
                f"{self._root}; the first is {missing[0]!r}"
            )
        if silent:
            counts.append(
                f"{len(silent)} of {total} images in {self.file} have no caption; the first is "
                f"{silent[0]!r}"
            )
        raise UserError(
            f"{'; '.join(counts)}: mend the list or data.path"
            + (f", or raise data.max_bad_fraction={share}" if len(bad) < total else "")
        )

    @property
    def _root(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def file(self) -> Path:
        """The caption file; of a folder without one, which holds classes, the folder itself."""
        return find_caption_file(self._root, self.captions)

    @cached_property
    def listed(self) -> CaptionFile:
        fields = (self.image_field, self.caption_field, self.label_field)
        if self.file.is_dir():
            if any((*fields, *self.columns)):
                raise UserError(f"{self.file} has no caption file whose columns data could name")
            return read_class_folders(self.file)
        return read_entries(self._root, self.file, *fields, self.columns)

    @cached_property
    def _examples(self) -> list[Entry]:
        if self.split == "all":
            return self.listed.entries
        # By a hash, so that an image stays in its split when others are added.
        held_out = self.split == "validation"
        return [e for e in self.listed.entries if (_fraction(e.path) < self.holdout) == held_out]

    @cached_property
    def _classes(self) -> tuple[dict[str, int], tuple[str, ...] | None]:
        """The number of each label, and the names of the classes if they are known."""
        names = open_names(self.label_names, "data.label_names")
        return number_labels(self.listed.labels, names, "data.label_names")

    def __len__(self) -> int:
        return len(self._examples)

    def fields(self) -> dict[str, FieldSpec]:
        fields = {"image": STRING, "captions": STRINGS, "path": STRING}
        if self.listed.labels:
            fields["label"] = FieldSpec((), np.dtype(np.int64))
        return fields | self._column_fields

    @cached_property
    def _column_fields(self) -> dict[str, FieldSpec]:
        values = {name: [e.columns[name] for e in self.listed.entries] for name in self.columns}
        return {name: spec_of_all(column) or STRING for name, column in values.items()}

    def is_text(self, name: str) -> bool:
        return name != "image"

    def place(self, index: int, name: str) -> tuple[str, int] | None:
        return self._examples[index].file, 0

    def rows(self, indices: np.ndarray, names: Sequence[str]) -> tuple[Rows, np.ndarray]:
        entries = [self._examples[index] for index in indices]
        found = empty_strings(len(entries))
        rows: Rows = {name: [entry.columns[name] for entry in entries] for name in self.columns}
        rows |= {
            "captions": [[text.encode() for text in entry.captions] for entry in entries],
            "path": [entry.path.encode() for entry in entries],
        }
        if self.listed.labels:
            rows["label"] = [self._classes[0].get(entry.label or "") for entry in entries]
        for number, entry in enumerate(entries):
            reasons = [reason for field, reason in entry.faults.items() if field in names]
            found[number] = reasons[0] if reasons else b""
        if "image" in names:
            rows["image"] = [None] * len(entries)
            for number, entry in enumerate(entries):
                if found[number]:
                    continue
                try:
                    rows["image"][number] = retrying(entry.file, Path(entry.file).read_bytes)
                except UserError as error:
                    # A file that is not there is a bad example; a disk that fails ends the run.
                    if not isinstance(error.__cause__, _GONE):
                        raise
                    found[number] = faults.marked(faults.UNREADABLE, str(error))
        return {name: rows[name] for name in names}, found

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self._classes[1] if field == "label" and self.listed.labels else None

    def describe(self, index: int) -> str:
        return self._examples[index].file

    def fingerprint(self) -> str:
        paths = "\n".join(entry.path for entry in self._examples)
        return hashlib.sha256(paths.encode()).hexdigest()[:16]


def _is_bad(entry: Entry) -> bool:
    return "image" in entry.faults or "captions" in entry.faults


def _fraction(path: str) -> float:
    """A number in [0, 1) from the hash of a path: uniform, and the same for ever."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64

"""A folder of image files with a CSV, TSV or JSONL file of paths and captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.files import retrying
from vlp_jax.data.sources import columns
from vlp_jax.data.sources.base import STRING, STRINGS, FieldSpec, Source
from vlp_jax.data.sources.caption_files import Entry, find_caption_file, read_entries
from vlp_jax.data.sources.records import empty_strings
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

# Of one file: it is a bad example. Anything else is the disk's, and ends the run.
_GONE = (FileNotFoundError, PermissionError, IsADirectoryError)
SPLITS = ("train", "validation", "all")


@dataclass(frozen=True)
class FolderSource(Source):
    """Image files below a folder, and a file in it that lists their paths and captions.

    The fields are `image` (encoded bytes), `captions` (byte strings [k], k at least 1), `path`
    (relative to the folder, with forward slashes) and, with `label_field`, `label` (int64). An
    image that several rows name is one example with several captions.

    Attributes:
      path: the folder.
      captions: the caption file, relative to the folder; None takes the only .csv, .tsv or .jsonl
        file in it. The first row of a CSV or TSV names the columns. UTF-8, with or without a BOM.
      image_field: the column of paths; None takes path, file, filename, filepath, file_name or
        image. Paths are relative to the folder, with either slash.
      caption_field: the column of captions; None takes caption, captions, text or title. In JSONL
        it may be a list.
      label_field: a column of class names or numbers, or None. The classes are the distinct
        values of the whole file, sorted.
      split: "train", "validation" or "all".
      holdout: the fraction of images in `validation`, chosen by a hash of their path, so that
        adding files moves none of the others.

    Raises:
      UserError: for a folder, file or column that is not there, a malformed line, an empty
        caption, missing images (how many, and the first), or a split without images.
    """

    path: str
    captions: str | None = None
    image_field: str | None = None
    caption_field: str | None = None
    label_field: str | None = None
    split: str = "train"
    holdout: float = 0.1

    def __post_init__(self) -> None:
        if not self.path or not self._root.is_dir():
            raise UserError(f"data.path={str(self.path)!r} is not a folder")
        if self.split not in SPLITS:
            raise UserError(f"data.split={self.split!r} is not one of {', '.join(SPLITS)}")
        if not 0 <= self.holdout < 1:
            raise UserError(f"data.holdout={self.holdout} is not a fraction in [0, 1)")
        if not self._examples:
            raise UserError(
                f"split {self.split!r} of {self._file} is empty: it lists {len(self._entries)} "
                f"images and data.holdout is {self.holdout}"
            )

    @property
    def _root(self) -> Path:
        return Path(self.path).expanduser()

    @cached_property
    def _file(self) -> Path:
        return find_caption_file(self._root, self.captions)

    @cached_property
    def _entries(self) -> list[Entry]:
        return read_entries(
            self._root, self._file, self.image_field, self.caption_field, self.label_field
        )

    @cached_property
    def _examples(self) -> list[Entry]:
        if self.split == "all":
            return self._entries
        held_out = self.split == "validation"
        return [e for e in self._entries if (_fraction(e.path) < self.holdout) == held_out]

    @cached_property
    def _labels(self) -> tuple[str, ...]:
        return _sorted_labels({entry.label for entry in self._entries if entry.label is not None})

    def __len__(self) -> int:
        return len(self._examples)

    def fields(self) -> dict[str, FieldSpec]:
        fields = {"image": STRING, "captions": STRINGS, "path": STRING}
        if self.label_field is not None:
            fields["label"] = FieldSpec((), np.dtype(np.int64))
        return fields

    def record_fields(self) -> dict[str, FieldSpec]:
        return columns.record_fields(self.fields())

    def fetch(
        self, indices: np.ndarray, names: Sequence[str] | None = None
    ) -> dict[str, np.ndarray]:
        entries = [self._examples[index] for index in indices]
        found = empty_strings(len(entries))
        rows: dict[str, list[Any]] = {
            "captions": [[text.encode() for text in entry.captions] for entry in entries],
            "path": [entry.path.encode() for entry in entries],
        }
        if self.label_field is not None:
            rows["label"] = [self._label_numbers[entry.label] for entry in entries]
        if names is None or "image" in names:
            rows["image"] = [None] * len(entries)
            for number, entry in enumerate(entries):
                try:
                    rows["image"][number] = retrying(entry.file, Path(entry.file).read_bytes)
                except UserError as error:
                    if not isinstance(error.__cause__, _GONE):
                        raise
                    found[number] = faults.marked(faults.UNREADABLE, str(error))
        return columns.pack(self.fields(), rows, found)

    @cached_property
    def _label_numbers(self) -> dict[str | None, int]:
        return {label: number for number, label in enumerate(self._labels)}

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        return columns.parse(self.fields(), record, names)

    def column(self, name: str) -> np.ndarray:
        return self.fetch(np.arange(len(self)), [name])[name]

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self._labels if field == "label" and self.label_field is not None else None

    def describe(self, index: int) -> str:
        return self._examples[index].file

    def fingerprint(self) -> str:
        paths = "\n".join(entry.path for entry in self._examples)
        return hashlib.sha256(paths.encode()).hexdigest()[:16]


def _fraction(path: str) -> float:
    """A number in [0, 1) from the hash of a path: uniform, and the same for ever."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64


def _sorted_labels(labels: set[str]) -> tuple[str, ...]:
    """Numbers in numerical order if all are numbers, else all in alphabetical order."""
    if all(label.isdecimal() for label in labels):
        return tuple(sorted(labels, key=lambda label: (int(label), label)))
    return tuple(sorted(labels))

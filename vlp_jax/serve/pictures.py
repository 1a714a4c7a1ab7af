"""The images that can be found: files of a folder, or an evaluator's data."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import PIL.Image

from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
THUMBNAIL = 256  # pixels of the longer side


class Pictures(Protocol):
    """Numbered images with names.

    Attributes:
      title: their origin, for people.
      names: a unique name for each image.
      versions: a text for each image that changes with its content.
    """

    title: str
    names: Sequence[str]
    versions: Sequence[str]

    def content(self, number: int) -> bytes:
        """Reads the file of an image."""


class Folder:
    """All image files below a folder, in the order of their paths; UserError if there are none."""

    def __init__(self, folder: Path, limit: int) -> None:
        if not folder.is_dir():
            raise UserError(f"--images {folder} is no folder")
        files = sorted(f for f in folder.rglob("*") if f.suffix.lower() in SUFFIXES and f.is_file())
        if not files:
            raise UserError(f"--images {folder} holds no image ({', '.join(sorted(SUFFIXES))})")
        self.found = len(files)
        self._files = files[:limit]
        self.title = str(folder)
        self.names = [str(f.relative_to(folder)) for f in self._files]
        # To hash the content would read the whole folder at each start.
        stats = [f.stat() for f in self._files]
        self.versions = [f"{s.st_size}-{s.st_mtime_ns}" for s in stats]

    def content(self, number: int) -> bytes:
        try:
            return self._files[number].read_bytes()
        except OSError as error:
            raise UserError(f"{self.names[number]} cannot be read any more: {error}") from None


class EvaluationImages:
    """The images of an evaluator of a run, as its data holds them."""

    def __init__(self, subject: Subject, evaluator: str, limit: int) -> None:
        self.title = f"the data of the evaluator {evaluator}"
        batches = subject.open_stored_data(evaluator, ("image",)).batches()
        stored = (b["image"][place] for b in batches for place in np.flatnonzero(b["mask"]))
        self._contents = [
            image if isinstance(image, bytes) else png(PIL.Image.fromarray(image))
            for image in itertools.islice(stored, limit)
        ]
        self.found = len(self._contents)
        self.names = [f"{evaluator} {number}" for number in range(self.found)]
        self.versions = [hashlib.sha256(c).hexdigest()[:16] for c in self._contents]

    def content(self, number: int) -> bytes:
        return self._contents[number]


def png(image: PIL.Image.Image) -> bytes:
    """Encodes an image as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def thumbnail(content: bytes, process: ImageProcessor) -> bytes:
    """Encodes a file's image as a WebP of at most `THUMBNAIL` pixels in width and height."""
    image = process.upright(*process.open(content, "the image"))
    factor = THUMBNAIL // max(image.size)
    if factor > 1:  # a small image is enlarged pixel by pixel: blurred, it would look broken
        size = tuple(side * factor for side in image.size)
        image = image.resize(size, PIL.Image.Resampling.NEAREST)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()

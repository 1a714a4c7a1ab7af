"""The images that can be found, and their embeddings on disk by faiss (Johnson et al. 2017).

FOLDER/index.faiss    the vectors
FOLDER/entries.json   the model, and the name and version of each image
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import PIL.Image
from jaxtyping import Float

from vlp_jax.encoders import Encoder
from vlp_jax.encoders.images import ImageProcessor
from vlp_jax.encoders.subject import Subject
from vlp_jax.errors import UserError
from vlp_jax.files import write_whole

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
THUMBNAIL = 256  # pixels of the longer side


class Pictures(Protocol):
    """Numbered images with unique names, and a version that changes with the content of each."""

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


VECTORS, ENTRIES = "index.faiss", "entries.json"
EXACT_UP_TO = 200_000  # images; beyond, the HNSW graph finds nearly all nearest neighbours
FORMAT = 1
BATCH = 64


@dataclasses.dataclass(frozen=True)
class Entries:
    """The images of an index, in the order of its vectors, and the fingerprint of the model."""

    model: str
    names: list[str]
    versions: list[str]


class ImageIndex:
    """Finds the nearest images in a faiss index of unit vectors; `places` has their numbers."""

    def __init__(self, vectors: Any, places: Sequence[int]) -> None:
        self._vectors, self._places = vectors, list(places)

    def __len__(self) -> int:
        return len(self._places)

    def nearest(self, query: Float[np.ndarray, " dim"], count: int) -> list[tuple[int, float]]:
        """Returns (number of the image, cosine similarity) pairs, the most similar first."""
        scores, found = self._vectors.search(query[None], min(count, len(self)))
        pairs = zip(found[0], scores[0], strict=True)
        # The graph of HNSW may find fewer, and says -1 for the rest.
        return [(self._places[i], float(score)) for i, score in pairs if i >= 0]


def fingerprint(encoder: Encoder) -> str:
    """Returns a hash of the parameters of the image tower and of its preprocessing."""
    # The repr of a frozen dataclass names all of its fields.
    digest = hashlib.sha256(repr((encoder.images, encoder.module)).encode())
    for path in sorted(encoder.weights):
        digest.update(path.encode())
        digest.update(np.ascontiguousarray(encoder.weights[path]).tobytes())
    return digest.hexdigest()[:32]


def default_folder(title: str) -> Path:
    """Returns the folder of the index of these images in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "vlp_jax" / "index" / hashlib.sha256(title.encode()).hexdigest()[:16]


def build_index(
    encoder: Encoder,
    pictures: Pictures,
    folder: Path,
    advance: Callable[[int], None],
    tell: Callable[[str], None],
) -> ImageIndex:
    """Builds the index of all images that can be read; only new or changed ones are embedded.

    Args:
      folder: keeps the index; an index of the same model in it is read first.
      advance: is called with the number of further images that are done.
      tell: is called with a line on images that are left out.

    Raises:
      UserError: no image can be read, or the folder cannot be written.
    """
    model = fingerprint(encoder)
    known = _known(folder, model)
    keys = list(zip(pictures.names, pictures.versions, strict=True))
    rows = {number: known[key] for number, key in enumerate(keys) if key in known}
    todo = [number for number in range(len(keys)) if number not in rows]
    advance(len(rows))
    bad = 0
    for begin in range(0, len(todo), BATCH):
        part = todo[begin : begin + BATCH]
        readable, pixels = [], []
        for number in part:
            try:
                pixels.append(encoder.images(pictures.content(number), pictures.names[number]))
                readable.append(number)
            except UserError as error:
                bad += 1
                if bad <= 5:
                    tell(f"left out: {error}")
        if pixels:
            rows |= zip(readable, encoder.apply("embed_image", pixels), strict=True)
        advance(len(part))
    if bad > 5:
        tell(f"left out: {bad - 5} more")
    if not rows:
        raise UserError(f"{pictures.title}: none of the images can be read")
    places = sorted(rows)
    vectors = _faiss_index(np.stack([rows[n] for n in places]))
    if todo or len(known) != len(rows):
        names, versions = map(list, zip(*(keys[n] for n in places), strict=True))
        _write(folder, vectors, Entries(model, names, versions))
    return ImageIndex(vectors, places)


def import_faiss() -> Any:
    """Imports the library; raises UserError if it is not installed."""
    try:
        import faiss
    except ImportError as error:
        raise UserError(
            f"the page needs faiss ({error}): pip install -r requirements-serve.txt"
        ) from None
    return faiss


def _faiss_index(vectors: Float[np.ndarray, "n dim"]) -> Any:
    faiss = import_faiss()
    # HNSW32: 32 links a node, the default of faiss.
    kind = "Flat" if len(vectors) <= EXACT_UP_TO else "HNSW32"
    index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
    index.add(np.ascontiguousarray(vectors, np.float32))
    return index


def _known(folder: Path, model: str) -> dict[tuple[str, str], np.ndarray]:
    """Reads (name, version) -> vector from `folder`; {} for the index of another model."""
    try:
        content = json.loads((folder / ENTRIES).read_text())
        if content.pop("format") != FORMAT:
            return {}
        entries = Entries(**content)
        if entries.model != model:
            return {}
        index = import_faiss().read_index(str(folder / VECTORS))
        keys = list(zip(entries.names, entries.versions, strict=True))
        if index.ntotal != len(keys):
            return {}
        return dict(zip(keys, index.reconstruct_n(0, index.ntotal), strict=True))
    except (OSError, ValueError, TypeError, KeyError, RuntimeError):
        return {}  # absent, or torn by a crash: the index is made anew


def _write(folder: Path, vectors: Any, entries: Entries) -> None:
    # The entries go first and come last: after a crash there are none, and the index is made anew.
    faiss = import_faiss()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ENTRIES).unlink(missing_ok=True)
        unfinished = folder / f"{VECTORS}.{os.getpid()}"
        faiss.write_index(vectors, str(unfinished))
        os.replace(unfinished, folder / VECTORS)
        content = {"format": FORMAT, **dataclasses.asdict(entries)}
        write_whole(folder / ENTRIES, json.dumps(content))
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"the index cannot be kept in {folder} ({error}): name another folder with --index"
        ) from None

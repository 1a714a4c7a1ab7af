"""Search by text and a look at one image: the answers of the page, without HTTP."""

from __future__ import annotations

import collections
import dataclasses
import threading
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
from jaxtyping import Float, UInt8

from vlp_jax.encoders import Encoder
from vlp_jax.errors import UserError
from vlp_jax.inspection import heat_map, overlay
from vlp_jax.serve.index import ImageIndex, Pictures, png, thumbnail

MAX_COUNT = 100  # images of one answer
MAX_TEXT = 2_000  # characters
MAX_TEXTS = 200  # candidates that are typed into the page
KEPT_IMAGES = 32  # newest uploads, for heat maps; memory must not grow with each upload
HEAT_MAP_SIDE = 384  # pixels
SHOWN_CLASSES = 5


@dataclasses.dataclass(frozen=True)
class Classes:
    """Texts that an image is compared with: names, and the prompts that are averaged for each."""

    title: str
    names: Sequence[str]
    prompts: Sequence[Sequence[str]]

    def __post_init__(self) -> None:
        repeated = [n for n, k in collections.Counter(self.names).items() if k > 1]
        if repeated:
            raise UserError(f"{self.title} hold {repeated[0]!r} more than once: name each once")
        for name in self.names:
            if not name.strip():
                raise UserError(f"{self.title}: a name is empty")

    @classmethod
    def of_names(cls, title: str, names: Sequence[str], templates: Sequence[str]) -> Classes:
        """Puts names into templates such as "a photo of a {}."; UserError for one without {}."""
        for template in templates:
            if "{}" not in template:
                raise UserError(f"the template {template!r} has no {{}} for the name of a class")
        prompts = [[t.replace("{}", name) for t in templates] for name in names]
        return cls(title, list(names), prompts)


class Explorer:
    """A model, an index of images, and classes. Calls may come from any thread."""

    def __init__(
        self, encoder: Encoder, pictures: Pictures, index: ImageIndex, classes: Classes | None
    ) -> None:
        self.encoder, self.pictures, self.index, self.classes = encoder, pictures, index, classes
        self._lock = threading.Lock()  # guards `_uploads`, and lets one request compute at a time
        self._uploads: collections.OrderedDict[str, UInt8[np.ndarray, "h w 3"]] = (
            collections.OrderedDict()
        )
        self._class_vectors = None if classes is None else self._embed_classes(classes)

    def about(self) -> dict[str, Any]:
        """Returns the facts at the top of the page: model, images and classes."""
        height, width = self.encoder.image_size
        return {
            "model": self.encoder.source,
            "step": self.encoder.step,
            "image_size": f"{height} x {width}",
            "context_length": self.encoder.tokenizer.context_length,
            "images": len(self.index),
            "images_of": self.pictures.title,
            "classes": len(self.classes.names) if self.classes else 0,
        }

    def search(self, text: str, count: int) -> dict[str, Any]:
        """Finds the images most similar to a text; UserError for a bad text or count."""
        count, text = _checked_count(count), _checked_text(text)
        with self._lock:
            vector, note = self._embed([text])
            found = self.index.nearest(vector[0], count)
        return {"results": self._named(found), "note": note}

    def look(self, content: bytes, count: int) -> dict[str, Any]:
        """Finds the classes of an image file and the images that are most similar to it.

        The `key` in the result names the image for `heat_map` and `compare`, for a while. Raises
        UserError if the file is no image, or too large.
        """
        count = _checked_count(count)
        pixels = self.encoder.images(content, "the file")
        with self._lock:
            vector = self.encoder.embed_image(pixels)[0]
            found = self.index.nearest(vector, count)
            key = uuid.uuid4().hex
            self._uploads[key] = pixels
            while len(self._uploads) > KEPT_IMAGES:
                self._uploads.popitem(last=False)
        best = []
        if self.classes is not None:
            best = self._ranked(vector, self._class_vectors, self.classes.names)[:SHOWN_CLASSES]
        return {"key": key, "classes": best, "results": self._named(found)}

    def look_at_known(self, number: int, count: int) -> dict[str, Any]:
        """Calls `look` with an image of the index."""
        return self.look(self.content(number), count)

    def compare(self, key: str, texts: Sequence[str]) -> dict[str, Any]:
        """Computes probabilities of typed texts for a kept image; UserError for bad ones."""
        if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_TEXTS:
            raise UserError(f"give 1 to {MAX_TEXTS} texts, a line each")
        texts = [_checked_text(text) for text in texts]
        Classes("the texts", texts, [[text] for text in texts])  # raises for one that is double
        pixels = self._upload(key)
        with self._lock:
            vectors, note = self._embed(texts)
            image = self.encoder.embed_image(pixels)[0]
        return {"classes": self._ranked(image, vectors, texts), "note": note}

    def heat_map(self, key: str, text: str) -> bytes:
        """Draws a PNG of a kept image with the regions marked that answer a text."""
        text = _checked_text(text)
        pixels = self._upload(key)
        with self._lock:
            tokens = self.encoder.texts([text])
            heat = heat_map(self.encoder.module, self.encoder.params, pixels[None], tokens)[0]
        # The model sees few pixels; a smooth map is easier to read than their squares.
        picture = PIL.Image.fromarray(overlay(pixels, np.asarray(heat)))
        factor = HEAT_MAP_SIDE / max(picture.size)
        size = tuple(round(side * factor) for side in picture.size)
        return png(picture.resize(size, PIL.Image.Resampling.BICUBIC))

    def content(self, number: int) -> bytes:
        """Reads the file of an image of the index; UserError if there is no such image."""
        if not 0 <= number < len(self.pictures.names):
            raise UserError(f"there is no image {number}")
        return self.pictures.content(number)

    def thumbnail(self, number: int) -> bytes:
        """Encodes a small WebP of an image of the index; raises as `content`."""
        return thumbnail(self.content(number), self.encoder.images)

    def _upload(self, key: str) -> np.ndarray:
        with self._lock:
            if key not in self._uploads:
                raise UserError("this image is not kept any more: open it again")
            self._uploads.move_to_end(key)
            return self._uploads[key]

    def _embed(self, texts: Sequence[str]) -> tuple[Float[np.ndarray, "n dim"], str | None]:
        """Embeds texts as unit vectors; also returns a note on texts that lose their end."""
        note = self.encoder.texts.too_long(texts)
        return self.encoder.apply("embed_text", self.encoder.texts.ids(texts)), note

    def _embed_classes(self, classes: Classes) -> Float[np.ndarray, "classes dim"]:
        flat = [prompt for prompts in classes.prompts for prompt in prompts]
        vectors = iter(self.encoder.embed_text(flat))
        means = np.stack([np.mean([next(vectors) for _ in p], axis=0) for p in classes.prompts])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def _ranked(
        self, image: np.ndarray, texts: np.ndarray, names: Sequence[str]
    ) -> list[dict[str, Any]]:
        """Ranks names with cosine similarity and probability, the likeliest first."""
        cosine = texts @ image
        logits = self.encoder.logit_scale * cosine
        odds = np.exp(logits - logits.max())  # without the maximum it could overflow
        share = odds / odds.sum()
        return [
            {"text": names[i], "similarity": float(cosine[i]), "probability": float(share[i])}
            for i in np.argsort(-share, kind="stable")
        ]

    def _named(self, found: Sequence[tuple[int, float]]) -> list[dict[str, Any]]:
        names = self.pictures.names
        return [{"image": n, "name": names[n], "similarity": score} for n, score in found]


def _checked_count(count: Any) -> int:
    if type(count) is not int or not 1 <= count <= MAX_COUNT:
        raise UserError(f"count is a whole number from 1 to {MAX_COUNT}, not {count!r}")
    return count


def _checked_text(text: Any) -> str:
    if not isinstance(text, str) or not text.strip():
        raise UserError("the text is empty: type what the image shows")
    if len(text) > MAX_TEXT:
        raise UserError(f"the text has {len(text):,} characters, more than {MAX_TEXT:,}")
    return text.strip()

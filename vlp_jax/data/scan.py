"""Statistics of the data of a config: text lengths, image sizes, bad records, duplicates."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from etils import epath
from PIL import Image

from vlp_jax.data import faults
from vlp_jax.data.image_ops.upright import orientation
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizers import build_tokenizer
from vlp_jax.data.tokenizers.base import frame_length
from vlp_jax.errors import UserError

RAW_TEXT, MASK = "text_raw", "mask"  # fields of batches
BATCH = 256
LONGEST = 2048  # tokens of a text that are counted
TURNED = (5, 6, 7, 8)  # orientations that swap width and height
_QUANTILES = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


@dataclass
class Scan:
    """Counts over the examples of a source that were looked at.

    Attributes:
      examples, read: how many the source has, and how many were looked at.
      bad: those that training would leave out, by reason.
      characters, tokens: of the text of each usable example; tokens with the special ones.
      sizes: (width, height) of each image, upright, from its header.
      encoded_bytes: of each image that is encoded.
      formats, digests: images by file format, and by the hash of their bytes.
    """

    examples: int
    read: int
    bad: Counter[str] = field(default_factory=Counter)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    encoded_bytes: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    digests: Counter[bytes] = field(default_factory=Counter)


class Tokenizers:
    """The tokenizer of a config, or None without one, and the lengths of texts in its tokens."""

    def __init__(
        self,
        config: Mapping[str, Any],
        texts: Callable[[], Iterator[str]],
        kept: epath.PathLike | None = None,
    ) -> None:
        """Trains it on `texts()` if the config says so, or reads `kept`, the file of a run."""
        self.usual = build_tokenizer(config, texts, kept) if config else None

    def lengths(self, texts: list[bytes]) -> list[int]:
        """Tokens of each text, special ones counted, as if it were not cut; none for no tokenizer.

        A text of more than `LONGEST` tokens (or twice the context) counts as that many.
        """
        if self.usual is None or not texts:
            return []
        longest = max(LONGEST, 2 * self.usual.context_length)
        special = frame_length(self.usual)
        return [min(len(row) + special, longest) for row in self.usual.encode(texts)]


def scan(
    data: Mapping[str, Any],
    tokenizers: Tokenizers,
    *,
    count: int,
    seed: int,
    begin: Callable[[int], None],
    advance: Callable[[int], None],
) -> Scan:
    """Looks at `count` examples of one source, which go through all operations of the config.

    All of them in the order of the source if there are no more, else the first of the order that
    training reads them in. `begin` is told how many will be looked at, `advance` how many more have
    been.
    """
    data = {key: value for key, value in data.items() if key != "batch_ops"}  # they mix examples
    source = build_source(data)
    found = Scan(len(source), min(count, len(source)))
    begin(found.read)
    # There is no raw text if the operations make none. Whether they do is known only by trying.
    try:
        texts = _Reader(data, found, seed, extra=RAW_TEXT)
    except UserError:
        texts = _Reader(data, found, seed)  # has no text, or another mistake, which is raised
    for batch in texts.batches():
        if RAW_TEXT in batch:
            raw = list(batch[RAW_TEXT][batch[MASK]])
            found.characters += [len(text.decode("utf-8", "replace")) for text in raw]
            found.tokens += tokenizers.lengths(raw)
        advance(len(batch[MASK]))
    found.bad.update(texts.bad())
    if "image" in source.fields():
        # A second pass over the files: the first has decoded the images.
        as_stored = {**data, "preprocess": {"keep": {"fields": ["image"]}}}
        for batch in _Reader(as_stored, found, seed, extra="image").batches():
            for image in batch["image"][batch[MASK]]:
                _add_image(found, image)
    return found


class _Reader:
    """The examples of one source that a scan looks at, as training or evaluation reads them."""

    def __init__(
        self, data: Mapping[str, Any], scan: Scan, seed: int, extra: str | None = None
    ) -> None:
        """`extra` names a field that batches shall hold that they would not."""
        self._read = scan.read
        common = {
            "batch_size": min(BATCH, scan.read),
            "extra_fields": [] if extra is None else [extra],
        }
        self._pipeline: EvalPipeline | TrainPipeline
        if scan.read == scan.examples:
            self._pipeline = EvalPipeline(data, None, **common)
        else:
            self._pipeline = TrainPipeline(data, None, seed=seed, **common)
        self._count = -(-self._read // common["batch_size"])

    def batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Each with `MASK`, which is False for what could not be used; no padding."""
        left = self._read
        for batch in itertools.islice(self._pipeline.batches(), self._count):
            batch = {name: values[:left] for name, values in batch.items()}
            size = len(next(iter(batch.values())))
            left -= size
            yield {MASK: np.ones(size, bool), **batch}

    def bad(self) -> dict[str, int]:
        """Reason -> examples that could not be used, of those that were read."""
        totals = self._pipeline.faults.totals(self._count)["bad"]
        return {reason: n for reasons in totals.values() for reason, n in reasons.items()}


def _add_image(found: Scan, image: bytes | np.ndarray) -> None:
    """An encoded image, or pixels [height, width, channels]."""
    if isinstance(image, np.ndarray):
        found.digests[hashlib.sha256(image.tobytes()).digest()] += 1
        found.sizes.append((image.shape[1], image.shape[0]))
        found.formats["pixels"] += 1
        return
    found.digests[hashlib.sha256(image).digest()] += 1
    found.encoded_bytes.append(len(image))
    try:
        with Image.open(io.BytesIO(image)) as opened:  # reads no more than the header
            width, height = opened.size
            turned = orientation(opened) in TURNED
            found.formats[str(opened.format)] += 1
    except Exception:  # Pillow raises a dozen kinds for a header that it cannot read
        found.formats["unknown"] += 1
        return
    found.sizes.append((height, width) if turned else (width, height))


def statistics(found: Scan, context_length: int | None) -> dict[str, Any]:
    """The figures of a scan, as they stand in stats.json."""
    figures: dict[str, Any] = {
        "examples": found.examples,
        "scanned": found.read,
        "bad": dict(found.bad.most_common()),
        "bad_share": sum(found.bad.values()) / found.read,
    }
    empty = found.bad[faults.EMPTY_TEXT] + found.characters.count(0)
    if found.characters or empty:
        text = {"empty": empty, "characters": summary(found.characters)}
        if found.tokens and context_length is not None:
            lengths = np.array(found.tokens)
            text |= {
                "tokens": summary(lengths),
                "context_length": context_length,
                "truncated_share": float((lengths > context_length).mean()),
                "histogram": histogram(lengths),
            }
        figures["text"] = text
    images = found.digests.total()
    if images:
        sizes = np.array(found.sizes, float).reshape(-1, 2)
        figures["image"] = {
            "width": summary(sizes[:, 0]),
            "height": summary(sizes[:, 1]),
            "aspect_ratio": summary(sizes[:, 0] / sizes[:, 1]),
            "encoded_bytes": summary(found.encoded_bytes),
            "formats": dict(found.formats.most_common()),
        }
        figures["duplicates"] = {
            "images": images,
            "share": 1 - len(found.digests) / images,
            "largest_group": max(found.digests.values()),
        }
    return figures


def summary(values: Any) -> dict[str, float] | None:
    """Mean and quantiles; None for no values."""
    values = np.asarray(values, float)
    if not values.size:
        return None
    quantiles = {name: float(np.percentile(values, q)) for name, q in _QUANTILES.items()}
    return {"mean": float(values.mean()), **quantiles}


def histogram(lengths: np.ndarray) -> dict[str, list[float]]:
    """Counts of whole numbers in at most 40 bins of equal width, and the bins' lower edges."""
    width = max(1, -(-int(lengths.max() + 1) // 40))
    counts = np.bincount(lengths // width)
    return {"from": (np.arange(len(counts)) * width).tolist(), "count": counts.tolist()}

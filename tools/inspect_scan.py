"""What `tools.inspect_data` counts: lengths of texts, sizes of images, bad records, duplicates."""

from __future__ import annotations

import hashlib
import io
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from PIL import Image

from vlp_jax.data import faults
from vlp_jax.data.example_graph import CHUNK, ExampleGraph
from vlp_jax.data.ops import build_ops
from vlp_jax.data.order import example_seeds
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.base import STRING, as_plain
from vlp_jax.data.tokenizers import Tokenizer, build_tokenizer

RUN = 64  # consecutive examples that a sample takes, so that files are read in pieces
LONGEST = 2048  # tokens of a text that are counted
TURNED = (5, 6, 7, 8)  # values of Exif's orientation that swap width and height
_ORIENTATION = 0x0112
_QUANTILES = {"min": 0, "p5": 5, "median": 50, "p95": 95, "max": 100}


@dataclass
class Scan:
    """What was found in the examples that were looked at, of one source.

    Attributes:
      examples: how many the source has.
      read: how many were looked at.
      bad: those that training would leave out, by reason.
      first_bad: for each reason, where the first one lies and what is wrong with it.
      characters, tokens: of the text of each usable example; tokens with the special ones.
      sizes: (width, height) of each image, upright, from its header.
      encoded_bytes: of each image that is encoded.
      formats: images by file format.
      digests: images by the hash of their bytes.
    """

    examples: int
    read: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    first_bad: dict[str, str] = field(default_factory=dict)
    characters: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    encoded_bytes: list[int] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    digests: Counter[bytes] = field(default_factory=Counter)


def parts_of(data: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Name -> data config of each source that a data config reads: one, or those of a mixture."""
    data = as_plain(data)
    if data.get("source") != "mixture":
        return {str(data.get("source")): data}
    return {
        name: {key: value for key, value in part.items() if key != "weight"}
        for name, part in data.get("parts", {}).items()
    }


class Tokenizers:
    """The tokenizer of a config, and the same one with room for long texts."""

    def __init__(self, config: Mapping[str, Any], texts: Callable[[], Iterator[str]]) -> None:
        """Trains it on `texts()` if the config says so. Without a config there is none.

        Raises:
          UserError: as `build_tokenizer`.
        """
        self.usual: Tokenizer | None = None
        self._long: Tokenizer | None = None
        if not config:
            return
        with TemporaryDirectory() as folder:
            file = Path(folder) / "tokenizer.json"  # trained once, read twice
            self.usual = build_tokenizer(config, texts, file)
            longest = max(LONGEST, 2 * self.usual.context_length)
            config = {**as_plain(config), "context_length": longest}
            self._long = build_tokenizer(config, texts, file)

    def lengths(self, texts: list[bytes]) -> list[int]:
        """Tokens of each text, special ones counted, as if it were not cut; none for no tokenizer.

        A text of more than `LONGEST` tokens (or twice the context) counts as that many.
        """
        if self._long is None or not texts:
            return []
        ends = self._long(texts) == self._long.eos_id
        return (ends.argmax(axis=1) + 1).tolist()


def chosen_indices(examples: int, count: int, seed: int) -> np.ndarray:
    """Which examples are looked at, int64 [min(examples, count)], in rising order.

    Runs of `RUN` consecutive ones at random places; all of them, where there are few.
    """
    if count >= examples:
        return np.arange(examples)
    run = min(RUN, max(count // RUN, 1))
    random = np.random.default_rng(seed)
    all_runs = -(-examples // run)
    runs = random.choice(all_runs, min(-(-count // run) + 1, all_runs), replace=False)
    indices = (runs[:, None] * run + np.arange(run)).ravel()
    return np.sort(indices[indices < examples][:count])


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

    Args:
      data: the data config of one source.
      begin: told how many will be looked at.
      advance: told how many more have been.

    Raises:
      UserError: a mistake in the config.
    """
    source, ops = build_source(data), build_ops(data.get("preprocess"))
    processed = ExampleGraph(source, ops)
    has_image = "image" in source.fields()
    raw = ExampleGraph(source, [], only=("image",)) if has_image else None
    found = Scan(len(source))
    indices = chosen_indices(len(source), count, seed)
    begin(len(indices))
    for first in range(0, len(indices), CHUNK):
        chunk = indices[first : first + CHUNK]
        seeds = example_seeds(seed, chunk, len(ops))
        outputs, usable = processed.run_once(chunk, seeds)
        for number in sorted({*range(len(chunk))} - set(usable.tolist())):
            fault = processed.diagnose(int(chunk[number]), seeds[number])
            found.bad[fault.reason] += 1
            found.first_bad.setdefault(fault.reason, fault.where)
        if processed.outputs.get("text") == STRING:
            _add_texts(found, list(outputs["text"]), tokenizers)
        if raw is not None:
            images, _ = raw.run_once(chunk, example_seeds(seed, chunk, 0))
            for image in images["image"]:
                _add_image(found, image)
        found.read += len(chunk)
        advance(len(chunk))
    return found


def _add_texts(found: Scan, texts: list[bytes], tokenizers: Tokenizers) -> None:
    found.characters += [len(text.decode("utf-8", "replace")) for text in texts]
    found.tokens += tokenizers.lengths(texts)


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
            turned = opened.getexif().get(_ORIENTATION) in TURNED
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
        "bad_share": sum(found.bad.values()) / max(found.read, 1),
        "first_bad": found.first_bad,
    }
    empty = found.bad[faults.EMPTY_TEXT]
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

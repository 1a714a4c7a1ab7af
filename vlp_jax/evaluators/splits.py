"""A split of a dataset for evaluators: embeddings, labels and captions, shared through a cache."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlp_jax.data.wording import caption_wording, captions_of
from vlp_jax.errors import NoScores, NotFinite, UserError
from vlp_jax.evaluators.base import INDEX, Resources, key_of
from vlp_jax.parallel import agreement


@dataclasses.dataclass(frozen=True, eq=False)
class Embedded:
    """Outputs by field, number fields, and positions of a whole split, on every process.

    `fields` also has the arrays among `extra_fields`.
    """

    outputs: Mapping[str, Float[np.ndarray, "n dim"]]
    fields: Mapping[str, np.ndarray]
    index: Int[np.ndarray, " n"]


class Split:
    """The examples of `data`, each once, and the outputs of functions on them.

    Within `Resources.one_evaluation`, splits of the same data share their outputs. Arrays among
    `extra_fields` (see `EvalPipeline`) become `Embedded.fields`.
    """

    def __init__(
        self, resources: Resources, data: Mapping[str, Any], extra_fields: Sequence[str] = ()
    ) -> None:
        self.resources, self.data = resources, data
        self.pipeline = resources.pipeline(data, extra_fields)
        self.key = key_of(data)
        # Fields with one number per example cost little, and another evaluator may need them.
        # Arrays, such as a second image, are kept only if they were asked for.
        spec = self.pipeline.batch_spec()
        self._numbers = [
            name
            for name, (shape, _) in spec.items()
            if (len(shape) == 1 or name in extra_fields) and name not in ("image", "text", "mask")
        ]

    def embed(self, params: Any, functions: Mapping[str, str]) -> Embedded:
        """Applies functions, field -> name, to all examples; NotFinite for NaN or infinity."""
        cache = self.resources.cache
        keys = {field: (self.key, field, name) for field, name in functions.items()}
        outputs = {field: cache.get(params, key) for field, key in keys.items()}
        needed = {field: name for field, name in functions.items() if outputs[field] is None}
        names = (*self._numbers, INDEX)
        fields = {name: cache.get(params, (self.key, name)) for name in names}
        if needed or any(value is None for value in fields.values()):
            # If only fields are missing, a pass over the data must still compute something.
            needed = needed or dict(functions)
            batches = self.pipeline.batches()
            batches = with_text_hashes(batches) if "text" in needed else batches
            keep = (*self._numbers, *([TEXT_HASH] if "text" in needed else []))
            new, fields = self.resources.embed(params, batches, needed, keep)
            if "text" in new:  # else the same caption could have two slightly different vectors
                new["text"] = same_for_same_text(new["text"], fields.pop(TEXT_HASH))
            for field, array in new.items():
                self._check_finite(array, needed[field])
                cache.put(params, keys[field], array)
            for name, array in fields.items():
                cache.put(params, (self.key, name), array)
            outputs |= new
        index = fields.pop(INDEX)
        return Embedded(outputs, fields, index)

    def _check_finite(self, array: np.ndarray, function: str) -> None:
        bad = (~np.isfinite(array.reshape(len(array), -1))).any(axis=1).sum()
        if bad:
            raise NotFinite(
                f"{function} gives no finite numbers for {bad} of {len(array)} examples"
            )

    def labels(self, embedded: Embedded, field: str, classes: int | None) -> Int[np.ndarray, " n"]:
        """Returns the labels in `field`, int64 [n]; `classes` is their number, None if unknown.

        Raises:
          UserError: `field` does not hold one whole number for each example.
          NoScores: a label is below 0, or not below `classes`.
        """
        if field not in embedded.fields:
            known = ", ".join(sorted(embedded.fields)) or "none"
            raise UserError(
                f"label_field: the examples have no number {field!r} (they have: {known})"
            )
        labels = embedded.fields[field]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            shape = list(labels.shape[1:])
            raise UserError(f"label_field: {field!r} is {labels.dtype}{shape}, not a whole number")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or (classes is not None and high >= classes):
            top = "" if classes is None else f", and class_names has {classes}"
            raise NoScores(f"label_field: {field!r} goes from {low} to {high}{top}")
        return labels.astype(np.int64)


TEXT_HASH = "_text_hash"


def text_hashes(tokens: Int[np.ndarray, "n length"]) -> Int[np.ndarray, "n 2"]:
    """Hashes each row of ids to 64 bits, as two int32: JAX's devices hold no int64 by default."""
    digests = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens]
    return np.frombuffer(b"".join(digests), np.int32).reshape(len(tokens), 2)


def with_text_hashes(
    batches: Iterator[Mapping[str, np.ndarray]],
) -> Iterator[Mapping[str, np.ndarray]]:
    """Adds the field `TEXT_HASH` to each batch."""
    for batch in batches:
        yield {**batch, TEXT_HASH: text_hashes(batch["text"])}


def same_for_same_text(
    vectors: Float[np.ndarray, "n dim"], hashes: Int[np.ndarray, "n 2"]
) -> Float[np.ndarray, "n dim"]:
    """Gives all equal texts the vector of the first one.

    The position of a text in its batch may change the last bit of its embedding. Then a caption
    that occurs twice would not tie with itself.
    """
    whole = np.ascontiguousarray(hashes).view(np.int64)[:, 0]
    _, first, place = np.unique(whole, return_index=True, return_inverse=True)
    return vectors if len(first) == len(vectors) else vectors[first[place]]


def embed_captions(split: Split, params: Any, field: str) -> tuple[np.ndarray, ...]:
    """Embeds a split's images and all captions in `field`, an extra field of the split.

    Returns:
      Vectors of the images; vectors of the captions, sorted by image; for each caption the row of
      its image; for each image its position in the data. Images without a caption are left out. All
      processes get the same arrays.

    Raises:
      UserError: `field` holds no text, or no example has any.
    """
    resources, cache = split.resources, split.resources.cache
    keys = [(split.key, "captions", field, part) for part in ("image", "text", "owners", "index")]
    cached = tuple(cache.get(params, key) for key in keys)
    if all(array is not None for array in cached):
        return cached
    texts, numbers = [], []
    batches = _without_captions(split, field, texts, numbers)
    outputs, fields = resources.embed(params, batches, {"image": "embed_image"})
    wording = caption_wording(split.data.get("preprocess"))
    vectors, owners = _embed_local(resources, params, wording(texts), np.array(numbers, np.int32))
    if not len(vectors):
        raise UserError(f"captions: no example has a caption in {field!r}")
    used, owners = np.unique(owners, return_inverse=True)
    # INDEX rises from batch to batch, and has every image that has captions.
    rows = np.searchsorted(fields[INDEX], used)
    arrays = (outputs["image"][rows], vectors, owners, fields[INDEX][rows])
    for key, array in zip(keys, arrays, strict=True):
        cache.put(params, key, array)
    return arrays


def _without_captions(
    split: Split, field: str, texts: list[bytes], numbers: list[int]
) -> Iterator[Mapping[str, np.ndarray]]:
    """Yields this process's batches without their captions, which devices cannot hold.

    Appends the captions to `texts`, and for each of them its example's position to `numbers`.
    """
    for number, batch in enumerate(split.pipeline.batches()):
        lists, mask = batch.pop(field), batch["mask"]
        start = (number * jax.process_count() + jax.process_index()) * len(mask)
        for row in np.flatnonzero(mask).tolist():
            captions = captions_of(lists[row])
            texts += captions
            numbers += [start + row] * len(captions)
        yield batch


def _embed_local(
    resources: Resources, params: Any, texts: list[bytes], numbers: Int[np.ndarray, " n"]
) -> tuple[Float[np.ndarray, "all dim"], Int[np.ndarray, " all"]]:
    """Embeds the texts of all processes; sorts them by `numbers`, otherwise keeps their order."""
    size = resources.batch_size // jax.process_count()
    # Processes have different numbers of captions, but must run equally many batches.
    rounds = max(agreement.gather(-(-len(texts) // size)))
    if not rounds:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int32)
    # Without texts: no rows, yet the tokenizer's length and dtype, for the padding below.
    tokens = resources.tokenizer(texts) if texts else resources.tokenizer([b" "])[:0]

    def batches() -> Iterator[dict[str, np.ndarray]]:
        for start in range(0, rounds * size, size):
            here = slice(start, start + size)
            padding = size - len(tokens[here])
            text = np.pad(tokens[here], ((0, padding), (0, 0)))
            yield {
                "text": text,
                TEXT_HASH: text_hashes(text),
                "number": np.pad(numbers[here], (0, padding)),
                "mask": np.arange(size) < size - padding,
            }

    outputs, fields = resources.embed(
        params, batches(), {"text": "embed_text"}, keep=("number", TEXT_HASH)
    )
    vectors = same_for_same_text(outputs["text"], fields[TEXT_HASH])
    order = np.argsort(fields["number"], kind="stable")
    return vectors[order], fields["number"][order]

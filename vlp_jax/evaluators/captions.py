"""Embeds images with several captions each, and all their captions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from vlp_jax.data.wording import caption_wording, captions_of
from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import INDEX, Resources
from vlp_jax.evaluators.splits import Split
from vlp_jax.evaluators.text_identity import TEXT_HASH, same_for_same_text, text_hashes
from vlp_jax.parallel import agreement

ImagesAndTexts = tuple[
    Float[np.ndarray, "images dim"],
    Float[np.ndarray, "texts dim"],
    Int[np.ndarray, " texts"],
    Int[np.ndarray, " images"],
]
_PARTS = ("image", "text", "owners", "index")


def embed_captions(split: Split, params: Any, field: str) -> ImagesAndTexts:
    """Embeds a split's images and all captions in `field`, an extra field of the split.

    Returns:
      Vectors of the images; vectors of the captions, sorted by image; for each caption the row of
      its image; for each image its position in the data. Images without a caption are left out. All
      processes get the same arrays.

    Raises:
      UserError: `field` holds no text, or no example has any.
    """
    cache = split.resources.cache
    keys = [(split.key, "captions", field, part) for part in _PARTS]
    arrays = [cache.get(params, key) for key in keys]
    if any(array is None for array in arrays):
        arrays = _embed(split, params, field)
        for key, array in zip(keys, arrays, strict=True):
            cache.put(params, key, array)
    image, text, owners, index = arrays
    return image, text, owners, index


def _embed(split: Split, params: Any, field: str) -> ImagesAndTexts:
    resources, texts, numbers = split.resources, [], []
    batches = _without_captions(split, field, texts, numbers)
    outputs, fields = resources.embed(params, batches, {"image": "embed_image"})
    wording = caption_wording(split.data.get("preprocess"))
    vectors, owners = _embed_local(resources, params, wording(texts), np.array(numbers, np.int32))
    if not len(vectors):
        raise UserError(f"captions: no example has a caption in {field!r}")
    used, owners = np.unique(owners, return_inverse=True)
    # INDEX rises from batch to batch, and has every image that has captions.
    rows = np.searchsorted(fields[INDEX], used)
    return outputs["image"][rows], vectors, owners, fields[INDEX][rows]


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

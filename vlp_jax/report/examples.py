"""Images and texts from the data of evaluators, to be shown beside their answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.source_reader import RAW_TEXT
from vlp_jax.data.wording import captions_of
from vlp_jax.encoders.subject import Subject
from vlp_jax.evaluators import merged_data

_BATCH = 64


def open_examples(subject: Subject, name: str, extra_fields: Sequence[str] = ()) -> EvalPipeline:
    """Opens the data of an evaluator, all of it on this process."""
    data = merged_data(subject.config.data, subject.config.evaluators[name])
    tokenizer = subject.resources.tokenizer
    return EvalPipeline(data, tokenizer, batch_size=_BATCH, extra_fields=extra_fields)


def images_at(subject: Subject, name: str, places: Sequence[int]) -> dict[int, np.ndarray]:
    """Reads images of an evaluator's data.

    Returns:
      place -> uint8 [height, width, 3].
    """
    wanted, found = set(map(int, places)), {}
    if not wanted:
        return found
    for number, batch in enumerate(open_examples(subject, name).batches()):
        for row, place in enumerate(range(number * _BATCH, (number + 1) * _BATCH)):
            if place in wanted:
                found[place] = np.asarray(batch["image"][row])
        if len(found) == len(wanted):  # data may be long, and the last place early
            break
    return found


def captions_and_images(
    subject: Subject, name: str, index: Sequence[int], places: Sequence[int]
) -> tuple[list[str], dict[int, np.ndarray]]:
    """Reads all texts of a retrieval evaluator in the order of its outcome, and some images.

    Args:
      index: of the outcome: the places in the data of the images that count.
      places: of the images that are read.

    Returns:
      the texts, and place -> uint8 [height, width, 3].
    """
    field = subject.config.evaluators[name].get("captions")
    extra = RAW_TEXT if field is None else field
    used, wanted = set(map(int, index)), set(map(int, places))
    texts: list[str] = []
    images: dict[int, np.ndarray] = {}
    for number, batch in enumerate(open_examples(subject, name, (extra,)).batches()):
        for row, place in enumerate(range(number * _BATCH, (number + 1) * _BATCH)):
            if place in used:
                texts += [_text(caption) for caption in _captions(batch[extra][row], field)]
            if place in wanted:
                images[place] = np.asarray(batch["image"][row])
    return texts, images


def _captions(value: Any, field: str | None) -> list[bytes]:
    return [value] if field is None else captions_of(value)


def _text(caption: bytes) -> str:
    # One bad byte must not cost the page.
    return caption.decode("utf-8", "replace")

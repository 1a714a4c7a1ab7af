"""What the evaluators find out of a set of parameters, kept for the page, and examples of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.data.caption_lists import captions_of
from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.stream import RAW_TEXT
from vlp_jax.encoders.subject import Subject
from vlp_jax.evaluators import merged_data
from vlp_jax.evaluators.base import Outcome
from vlp_jax.report.scores import PREFIX
from vlp_jax.training.restore import LoadedParameters

_BATCH = 64


@dataclasses.dataclass(frozen=True)
class Findings:
    """What was found out about a model.

    Attributes:
      scores: "eval/EVALUATOR/NAME" -> value.
      outcomes: evaluator -> its arrays, of those that give them.
    """

    scores: Mapping[str, float]
    outcomes: Mapping[str, Outcome]


def find(
    subject: Subject, loaded: LoadedParameters, names: Sequence[str] | None = None
) -> Findings:
    """Runs the evaluators, each once. On every process.

    Args:
      names: of evaluators; None for all that the subject has.
    """
    scores: dict[str, float] = {}
    outcomes: dict[str, Outcome] = {}
    with subject.resources.one_evaluation(loaded.params):
        for name in subject.evaluators if names is None else names:
            evaluator = subject.evaluators[name]
            outcome = evaluator.outcome(loaded.params) if hasattr(evaluator, "outcome") else None
            if isinstance(outcome, Outcome):
                outcomes[name] = outcome
                named = outcome.scores()
            else:
                named = dict(evaluator(loaded.params))
            scores |= {f"{PREFIX}{name}/{score}": value for score, value in named.items()}
    return Findings(scores, outcomes)


def open_examples(subject: Subject, name: str, extra_fields: Sequence[str] = ()) -> EvalPipeline:
    """The data of an evaluator, all of it on this process."""
    data = merged_data(subject.config.data, subject.config.evaluators[name])
    tokenizer = subject.resources.tokenizer
    return EvalPipeline(data, tokenizer, batch_size=_BATCH, extra_fields=extra_fields)


def images_at(subject: Subject, name: str, places: Sequence[int]) -> dict[int, np.ndarray]:
    """Place in an evaluator's data -> uint8 [height, width, 3]; reads no further than it must."""
    wanted, found = set(map(int, places)), {}
    if not wanted:
        return found
    for number, batch in enumerate(open_examples(subject, name).batches()):
        for row, place in enumerate(range(number * _BATCH, (number + 1) * _BATCH)):
            if place in wanted:
                found[place] = np.asarray(batch["image"][row])
        if len(found) == len(wanted):
            break
    return found


def captions_and_images(
    subject: Subject, name: str, index: Sequence[int], places: Sequence[int]
) -> tuple[list[str], dict[int, np.ndarray]]:
    """All texts of a retrieval evaluator in the order of its outcome, and images at some places.

    Args:
      index: of the outcome: the places in the data of the images that count.
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
    return caption.decode("utf-8", "replace")

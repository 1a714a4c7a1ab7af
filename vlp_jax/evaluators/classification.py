"""Scores of classifiers from logits, and the evaluators that classify images and answer questions.

Sums over examples are in float64, so the scores do not depend on batches or devices.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Evaluator, Pairs, Resources
from vlp_jax.evaluators.class_lists import check_field, check_labels, numbers_of_model, renumber

CALIBRATION_BINS = 15  # Guo et al. 2017, section 5


def label_ranks(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Counts the other classes that score at least as high as the right one; 0 is a hit.

    Ties count against the model, or a model with equal scores for all classes would be right. So
    does a score that is NaN. Raises ValueError for a label that is not in [0, classes).
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        span = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels go from {span}, and there are {logits.shape[1]} classes")
    right = np.take_along_axis(logits, labels[:, None].astype(int), axis=1)
    # Not `logits >= right`, which is False for NaN.
    return (~(logits < right)).sum(axis=1) - 1


def top_k(ranks: Int[np.ndarray, " n"], k: int) -> float:
    """Returns the share of examples whose class is among the k highest, in [0, 1]."""
    return float((ranks < k).mean())


def mean_per_class_recall(ranks: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Computes the top-1 of each class that occurs, and averages over these classes; in [0, 1]."""
    counts = np.bincount(labels)
    hits = np.bincount(labels[ranks < 1], minlength=len(counts))
    present = counts > 0
    return float((hits[present] / counts[present]).mean())


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Computes the logarithms of the softmax, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def negative_log_likelihood(
    log_probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> float:
    """Computes the mean of -log p(right class), in nats."""
    return float(-np.take_along_axis(log_probabilities, labels[:, None], axis=1).mean())


def calibration_bins(
    confidences: Float[np.ndarray, " n"], hits: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[Int[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Divides (0, 1] into `bins` equal bins; returns count, mean confidence and accuracy of each.

    A bin includes its upper end and not its lower end (Guo et al. 2017, section 2). `confidences`
    are the probabilities of the predicted classes, `hits` whether these are right.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(edges, confidences, side="left")
    counts = np.bincount(place, minlength=bins)
    divisor = np.maximum(counts, 1)
    confidence = np.bincount(place, weights=confidences, minlength=bins) / divisor
    accuracy = np.bincount(place, weights=hits.astype(np.float64), minlength=bins) / divisor
    return counts, confidence, accuracy


def calibration_error(
    confidences: Float[np.ndarray, " n"], hits: np.ndarray, bins: int = CALIBRATION_BINS
) -> float:
    """Computes the expected calibration error, in [0, 1] (Guo et al. 2017, eq. 3).

    It is the gap between confidence and accuracy in each bin, weighted by the bin's examples.
    """
    counts, confidence, accuracy = calibration_bins(confidences, hits, bins)
    return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())


class Accuracy(Evaluator):
    """Scores top-1 and top-5 accuracy of the objective's classifier.

    Args:
      data: images, with the class as a whole number in `label_field`. Labels that are words are
        matched by name with the classes of the training data.

    Raises:
      UserError: the field is missing, or the training data lacks a class.
    """

    needs = ("classify",)

    def __init__(
        self, *, data: Mapping[str, Any], resources: Resources, label_field: str = "label"
    ):
        self._resources, self._label_field = resources, label_field
        self._pipeline = resources.pipeline(data)
        check_field(self._pipeline, label_field, "accuracy")
        self._numbers = numbers_of_model(resources, data, self._pipeline, label_field)

    def pairs(self, params: Any) -> Pairs:
        """Yields `top1`, `top5` (with six classes or more) and `mean_per_class`, and two counts.

        The scores are in [0, 1]. Raises NoScores for a label that the model does not score.
        """
        batches, keep = self._pipeline.batches(), (self._label_field,)
        scores, fields = self._resources.outputs(params, batches, "classify", ("image",), keep)
        labels = renumber(fields[self._label_field], self._numbers)
        check_labels(labels, scores.shape[1], self._label_field)
        ranks = label_ranks(scores, labels)
        yield "top1", top_k(ranks, 1)
        if scores.shape[1] > 5:
            yield "top5", top_k(ranks, 5)
        yield "mean_per_class", mean_per_class_recall(ranks, labels)
        yield "examples", float(len(labels))
        yield "classes", float(scores.shape[1])


class Answers(Evaluator):
    """Scores the accuracy of answers to visual questions, over all questions and by kind.

    Args:
      data: images with a question in `text`, and the answer as a whole number in `label_field`. If
        `kind` is a whole number too, each kind has a score.
      questions: the number of questions of an example. Each is asked once, by setting
        `preprocess.choose_question.index` to 0, 1, ... None if an example has one question.
      kinds: names of the kinds; by default the dataset's names for `kind_field`.
      kind_field: the field of the dataset from which `kind` is taken.
    """

    needs = ("answer",)

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        questions: int | None = None,
        label_field: str = "answer",
        kinds: tuple[str, ...] | None = None,
        kind_field: str = "questions/kind",
    ):
        self._resources, self._label_field = resources, label_field
        # One pass over the data for each question: a pass chooses one question of every example.
        self._pipelines = [resources.pipeline(one) for one in _each_question(data, questions)]
        first = self._pipelines[0]
        check_field(first, label_field, "answers")
        self._has_kind = "kind" in first.batch_spec()
        names = first.class_names(kind_field) if self._has_kind and kinds is None else kinds
        self._kinds = tuple(names or ())

    def pairs(self, params: Any) -> Pairs:
        """Yields `accuracy`, `accuracy_KIND` of each kind, `questions`, and two baselines.

        The baselines answer without seeing the image: `most_common` always gives the most common
        answer of the split, `most_common_of_kind` the most common answer of the kind. All
        are in [0, 1]. Raises NoScores for an answer that the model does not score.
        """
        right, labels, kinds = [], [], []
        for pipeline in self._pipelines:
            keep = (self._label_field, *(["kind"] if self._has_kind else []))
            scores, fields = self._resources.outputs(
                params, pipeline.batches(), "answer", ("image", "text"), keep
            )
            answers = fields[self._label_field]
            check_labels(answers, scores.shape[1], self._label_field)
            right.append(label_ranks(scores, answers) < 1)
            labels.append(answers)
            kinds.append(fields.get("kind", np.zeros(len(answers), int)))
        right, labels, kinds = (np.concatenate(x) for x in (right, labels, kinds))
        yield "accuracy", float(right.mean())
        by_kind = 0
        for kind in np.unique(kinds).tolist() if self._has_kind else ():
            name = self._kinds[kind] if 0 <= kind < len(self._kinds) else str(kind)
            yield f"accuracy_{name}", float(right[kinds == kind].mean())
            by_kind += np.bincount(labels[kinds == kind]).max()
        yield "questions", float(len(right))
        yield "most_common", float(np.bincount(labels).max() / len(labels))
        if self._has_kind:
            yield "most_common_of_kind", float(by_kind / len(labels))


def _each_question(data: Mapping[str, Any], questions: int | None) -> Iterator[dict[str, Any]]:
    """Yields the data config once for each question, with the question's index in `preprocess`."""
    data = as_plain(data)
    if questions is None:
        yield data
        return
    if isinstance(questions, bool) or not isinstance(questions, int) or questions < 1:
        raise UserError(f"answers: questions must be None or at least 1, got {questions!r}")
    preprocess = data.get("preprocess") or {}
    if not isinstance(preprocess, Mapping) or "choose_question" not in preprocess:
        raise UserError(
            "answers: questions is set, and the preprocess of the data has no choose_question"
        )
    for index in range(questions):
        chosen = {**(preprocess["choose_question"] or {}), "index": index}
        yield {**data, "preprocess": {**preprocess, "choose_question": chosen}}

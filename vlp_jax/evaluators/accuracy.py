"""Accuracy of image classifiers, and of answers to visual questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError
from vlp_jax.evaluators import classification
from vlp_jax.evaluators.base import Evaluator, Pairs, Resources
from vlp_jax.evaluators.class_lists import renumber
from vlp_jax.evaluators.outputs import check_field, check_labels, numbers_of_model


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
        ranks = classification.label_ranks(scores, labels)
        yield "top1", classification.top_k(ranks, 1)
        if scores.shape[1] > 5:
            yield "top5", classification.top_k(ranks, 5)
        yield "mean_per_class", classification.mean_per_class_recall(ranks, labels)
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
            right.append(classification.label_ranks(scores, answers) < 1)
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

"""Accuracy of a classifier, and of answers to questions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError
from vlp_jax.evaluators.base import Evaluator, Pairs, Resources
from vlp_jax.evaluators.class_lists import renumber
from vlp_jax.evaluators.outputs import (
    check_field,
    check_labels,
    numbers_of_model,
    outputs_of,
    ranks,
)


class Accuracy(Evaluator):
    """How often a classifier has the right class at the top, or among its first five.

    Args:
      data: of the images, with the class as a whole number in `label_field`. If labels are words,
        their classes are those of the same names in the training data.

    Raises:
      UserError: there is no such field, or the training data lacks a class.
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
        """`top1`, `top5` (of six classes or more) and `mean_per_class`, the mean over the classes
        that occur of their own top-1, all in [0, 1]; `examples` and `classes`.

        Raises:
          UserError: a label that the model has no score for.
        """
        scores, fields = outputs_of(
            self._resources,
            params,
            self._pipeline.batches(),
            "classify",
            ("image",),
            keep=(self._label_field,),
        )
        labels = renumber(fields[self._label_field], self._numbers)
        check_labels(labels, scores.shape[1], self._label_field)
        rank = ranks(scores, labels)
        yield "top1", float((rank < 1).mean())
        if scores.shape[1] > 5:
            yield "top5", float((rank < 5).mean())
        per_class = [(rank[labels == label] < 1).mean() for label in np.unique(labels)]
        yield "mean_per_class", float(np.mean(per_class))
        yield "examples", float(len(labels))
        yield "classes", float(scores.shape[1])


class Answers(Evaluator):
    """How often the right answer to a question has the highest score, over all and by kind.

    Args:
      data: of the images with their questions: `text`, and the answer as a whole number in
        `label_field`. If `kind` is a whole number too, there is a score for each kind.
      questions: how many questions an example has: `preprocess.choose_question.index` goes from 0
        up to below it, so that each is asked once. None: the data has one question an example.
      kinds: names of the kinds; default: those that the dataset knows for `kind_field`.
      kind_field: the field of the dataset that `kind` is taken from.
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
        self._pipelines = [resources.pipeline(one) for one in _each_question(data, questions)]
        first = self._pipelines[0]
        check_field(first, label_field, "answers")
        self._has_kind = "kind" in first.batch_spec()
        names = first.class_names(kind_field) if self._has_kind and kinds is None else kinds
        self._kinds = tuple(names or ())

    def pairs(self, params: Any) -> Pairs:
        """`accuracy`, `accuracy_KIND` of each kind that occurs, in [0, 1]; `questions`; and what
        knowing no image comes to: `most_common`, the accuracy of always giving the most common
        answer of the split, and `most_common_of_kind`, that of always giving the one of the kind.

        Raises:
          UserError: an answer that the model has no score for.
        """
        right, labels, kinds = [], [], []
        for pipeline in self._pipelines:
            scores, fields = outputs_of(
                self._resources,
                params,
                pipeline.batches(),
                "answer",
                ("image", "text"),
                keep=(self._label_field, *(["kind"] if self._has_kind else [])),
            )
            own = fields[self._label_field]
            check_labels(own, scores.shape[1], self._label_field)
            right.append(ranks(scores, own) < 1)
            labels.append(own)
            kinds.append(fields.get("kind", np.zeros(len(own), int)))
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
    """The data once for each question, with the number of it in its preprocess.

    Raises:
      UserError: there is no operation that chooses a question, or not one question.
    """
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

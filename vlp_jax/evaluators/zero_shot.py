"""Zero-shot classification by prompts (Radford et al. 2021, 3.1)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.evaluators import classification
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.class_lists import (
    check_templates,
    fill,
    lines,
    names_of_classes,
    numbers_onto,
    renumber,
)
from vlp_jax.evaluators.splits import Split


@dataclasses.dataclass(frozen=True, eq=False)
class ZeroShotOutcome(Outcome):
    """Unit vectors of the images of a split, in the order of the source, and of the classes.

    `labels` number `class_names`, the names as they appear in the prompts; `index` is the position
    of each example in its source (after `where` and `limit`). `logit_scale` is the model's factor
    on the cosine similarity; without it there are no probabilities.
    """

    image: Float[np.ndarray, "n dim"]
    class_embeddings: Float[np.ndarray, "classes dim"]
    labels: Int[np.ndarray, " n"]
    class_names: tuple[str, ...]
    index: Int[np.ndarray, " n"]
    logit_scale: float | None

    saved = ("image", "class_embeddings", "labels", "class_names", "index")

    @cached_property
    def cosines(self) -> Float[np.ndarray, "n classes"]:
        """The cosine similarities of images and classes, in [-1, 1]."""
        return self.image @ self.class_embeddings.T

    @cached_property
    def ranks(self) -> Int[np.ndarray, " n"]:
        """For each image the number of classes that beat the right one; 0 is a hit."""
        return classification.label_ranks(self.cosines, self.labels)

    @cached_property
    def log_probabilities(self) -> Float[np.ndarray, "n classes"]:
        """The logarithms of softmax(logit_scale * cosine), float64; ValueError without a scale."""
        if self.logit_scale is None:
            raise ValueError("the model has no logit_scale, and so no probabilities")
        return classification.log_softmax(self.logit_scale * self.cosines.astype(np.float64))

    @property
    def probabilities(self) -> Float[np.ndarray, "n classes"]:
        """The probabilities of the classes: exp(log_probabilities)."""
        return np.exp(self.log_probabilities)

    def scores(self) -> dict[str, float]:
        """Computes `top1`, `top5`, `mean_per_class_recall` (in [0, 1]), and facts of the data.

        A model with a `logit_scale` also has `calibration_error` (expected, 15 bins of equal width:
        Guo et al. 2017) in [0, 1], and `nll`, the mean negative log-likelihood in nats.
        """
        classes = len(self.class_names)
        scores = {
            "top1": classification.top_k(self.ranks, 1),
            "top5": classification.top_k(self.ranks, 5),
            "mean_per_class_recall": classification.mean_per_class_recall(self.ranks, self.labels),
        }
        if self.logit_scale is not None:
            confidences = self.probabilities.max(axis=1)
            scores |= {
                "calibration_error": classification.calibration_error(confidences, self.ranks < 1),
                "nll": classification.negative_log_likelihood(self.log_probabilities, self.labels),
            }
        return {
            **scores,
            "examples": float(len(self.labels)),
            "classes": float(classes),
            "chance": 1 / classes,
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the fields `saved`, and the factor if there is one."""
        scale = {} if self.logit_scale is None else {"logit_scale": np.float32(self.logit_scale)}
        return {**super().arrays(), **scale}


class ZeroShot(Evaluator):
    """Classifies images by the similarity to prompts that name the classes.

    The vector of a class is the normalized mean of the unit vectors of all its prompts.

    Args:
      data: images, with the class as an integer in `label_field`.
      templates: prompts with `{}` or `{c}` in place of the class's name, or the path of a file with
        one prompt a line.
      class_names: names by label, or the path of a file with one name a line; None for the
        dataset's names of `label_field`. Empty lines and lines that begin with # are skipped. If
        labels of the data are words, classes are matched by name (`labels.same_numbers`).

    Raises:
      UserError: a template without a place for the name, no names or a name that occurs twice, a
        class of the data without a name, or a file that cannot be read.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {"templates": ("{}",)}
    needs = ("embed_image", "embed_text")

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        templates: Sequence[str] | str = ("a photo of a {}.",),
        label_field: str = "label",
        class_names: Sequence[str] | str | None = None,
    ):
        self._resources = resources
        self._label_field = label_field
        self.templates = check_templates(lines(templates, "templates"))
        self._split = Split(resources, data, extra_fields=(label_field,))
        named = self._split.pipeline.class_names(label_field)
        self.class_names = names_of_classes(class_names, named, label_field)
        # The bound of labels in the data, which are classes here unless the data names its own.
        self._numbers, self._labels = None, len(self.class_names)
        # Labels of the data count in the dataset's names, which may be in another order.
        if named is not None:
            where = f"{label_field!r} in the data"
            self._numbers = numbers_onto(named, self.class_names, where, "class_names")
            self._labels = len(named)

    def numbers(self, labels: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
        """Maps labels of the data to numbers in `class_names`."""
        return renumber(labels, self._numbers)

    def class_embeddings(self, params: Any) -> Float[np.ndarray, "classes dim"]:
        """Computes a unit vector for each class."""
        # Class by class, so that the reshape below collects the prompts of each class.
        prompts = [fill(t, name) for name in self.class_names for t in self.templates]
        vectors = self._resources.embed_texts(params, prompts)
        means = vectors.reshape(len(self.class_names), len(self.templates), -1).mean(axis=1)
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def outcome(self, params: Any) -> ZeroShotOutcome:
        """Embeds the whole split and the classes; raises NoScores for a label of no class."""
        embedded = self._split.embed(params, {"image": "embed_image"})
        labels = self.numbers(self._split.labels(embedded, self._label_field, self._labels))
        return ZeroShotOutcome(
            image=embedded.outputs["image"],
            class_embeddings=self.class_embeddings(params),
            labels=labels,
            class_names=self.class_names,
            index=embedded.index,
            logit_scale=self._resources.logit_scale(params),
        )

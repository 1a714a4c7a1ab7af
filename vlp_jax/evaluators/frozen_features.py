"""Frozen features and labels of a training and a test split, for probes, few-shot and kNN."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.evaluators.base import Resources
from vlp_jax.evaluators.class_lists import joined_classes, renumber
from vlp_jax.evaluators.splits import Split


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """Features and labels of both splits, in the order of their sources.

    Attributes:
      train: float32 [m, dim].
      train_labels: int64 [m].
      test: float32 [n, dim].
      test_labels: int64 [n].
      classes: the number of `class_names`, or without names the largest label + 1.
      class_names: names by label, if the datasets know them: the classes of the training data, then
        those that only the test data has.
      index: int64 [n], the position of each test example in its source (after `where`, `limit`).
    """

    train: Float[np.ndarray, "m dim"]
    train_labels: Int[np.ndarray, " m"]
    test: Float[np.ndarray, "n dim"]
    test_labels: Int[np.ndarray, " n"]
    classes: int
    class_names: tuple[str, ...] | None
    index: Int[np.ndarray, " n"]

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays for `save_embeddings`."""
        names = {} if self.class_names is None else {"class_names": np.array(self.class_names)}
        return {
            "train": self.train,
            "train_labels": self.train_labels,
            "test": self.test,
            "test_labels": self.test_labels,
            "classes": np.array(self.classes),
            "index": self.index,
            **names,
        }


class FeatureSplits:
    """Computes the `FrozenFeatures` of given parameters.

    Labels of the test split are renumbered by class name to match the training split.

    Args:
      data, train_data: images to test and to train on, with the class in `label_field`.
      features: name of the objective's function that computes features.

    Raises:
      UserError: the objective lacks the function, or the splits have no class in common.
    """

    def __init__(
        self,
        resources: Resources,
        data: Mapping[str, Any],
        train_data: Mapping[str, Any],
        label_field: str,
        features: str,
    ) -> None:
        self._function = resources.check_function(features)
        self._label_field = label_field
        self._test = Split(resources, data, (label_field,))
        self._train = Split(resources, train_data, (label_field,))
        self._train_names, self._test_names = (
            split.pipeline.class_names(label_field) for split in (self._train, self._test)
        )
        self._names, self._numbers = joined_classes(self._train_names, self._test_names)

    def __call__(self, params: Any) -> FrozenFeatures:
        """Computes features and labels of both splits.

        Raises:
          UserError: a label is not the number of a class.
        """
        test, test_labels = self._of(self._test, params, self._test_names)
        train, train_labels = self._of(self._train, params, self._train_names)
        test_labels = renumber(test_labels, self._numbers)
        largest = max(int(test_labels.max()), int(train_labels.max()))
        return FrozenFeatures(
            train.outputs["image"],
            train_labels,
            test.outputs["image"],
            test_labels,
            classes=largest + 1 if self._names is None else len(self._names),
            class_names=self._names,
            index=test.index,
        )

    def _of(self, split: Split, params: Any, names: tuple[str, ...] | None) -> tuple[Any, Any]:
        embedded = split.embed(params, {"image": self._function})
        # If only one split knows the names, they hold for both.
        known = names or self._names
        return embedded, split.labels(embedded, self._label_field, len(known) if known else None)

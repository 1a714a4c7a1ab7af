"""Evaluators of frozen features: few-shot classification and nearest neighbours; their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import UserError
from vlp_jax.evaluators import neighbours, probes
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.class_lists import joined_classes, renumber
from vlp_jax.evaluators.splits import Split


@dataclasses.dataclass(frozen=True, eq=False)
class FrozenFeatures:
    """Features and labels of both splits, in the order of their sources.

    `class_names` has the classes of the training data, then those that only the test data has, if
    the datasets know them; `classes` is their number, or without names the largest label + 1.
    `index` is the position of each test example in its source (after `where`, `limit`).
    """

    train: Float[np.ndarray, "m dim"]
    train_labels: Int[np.ndarray, " m"]
    test: Float[np.ndarray, "n dim"]
    test_labels: Int[np.ndarray, " n"]
    classes: int
    class_names: tuple[str, ...] | None
    index: Int[np.ndarray, " n"]


@dataclasses.dataclass(frozen=True, eq=False)
class FeaturesOutcome(Outcome):
    """Base of outcomes that score `features`, the features and labels of both splits."""

    features: FrozenFeatures

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the fields `saved`, and those of the features that are known."""
        features = {k: np.asarray(v) for k, v in vars(self.features).items() if v is not None}
        return {**features, **super().arrays()}

    def counts(self) -> dict[str, float]:
        """Counts the examples of both splits, and the classes."""
        return {
            "examples": float(len(self.features.test)),
            "train_examples": float(len(self.features.train)),
            "classes": float(self.features.classes),
        }


class FeatureSplits:
    """Computes the `FrozenFeatures` of given parameters by the objective's function `features`.

    Labels of the test split are renumbered by class name to match the training split.

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
        """Computes features and labels of both splits; raises UserError for a label of no class."""
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


L2_GRID = tuple(10.0**power for power in range(-3, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotOutcome(FeaturesOutcome):
    """The top-1 accuracy of each draw of training images, and the `l2` chosen from `grid`."""

    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracy: Float[np.ndarray, "shots seeds"]
    l2: Float[np.ndarray, "shots seeds"]
    grid: tuple[float, ...]

    saved = ("shots", "seeds", "accuracy", "l2", "grid")

    def scores(self) -> dict[str, float]:
        """Computes `top1_Nshot` and `top1_Nshot_std` (the population's), and counts."""
        scores = {}
        for shots, row in zip(self.shots, self.accuracy, strict=True):
            scores[f"top1_{shots}shot"] = float(row.mean())
            scores[f"top1_{shots}shot_std"] = float(row.std())
        counts = self.counts()
        return {
            **scores,
            "seeds": float(len(self.seeds)),
            "examples": counts["examples"],
            "classes": counts["classes"],
        }


class FewShot(Evaluator):
    """Scores ridge regression on n training images of each class, over several draws.

    Features are standardized by the drawn images. Targets are 1 for the class and -1 for other
    classes. The regularization is chosen from `grid` by the leave-one-out error on the drawn images
    alone.

    Args:
      data: test images, with the class as an integer in `label_field`.
      train_data: differences from `data` for the training images, such as {"split": "train"}.
      shots: numbers of images per class; each is scored.
      seeds: number of draws, with the seeds 0, 1, ... A draw depends on (seed, shots) alone.
      grid: strengths of l2 regularization.
      features: name of the objective's function that computes features.

    Raises:
      UserError: a value out of range, or the objective lacks the function.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {"grid": (100.0, 1000.0), "shots": (1,)}
    needs = ()

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        train_data: Mapping[str, Any],
        resources: Resources,
        shots: Sequence[int] = (1, 2, 4, 8, 16),
        seeds: int = 3,
        grid: Sequence[float] = L2_GRID,
        features: str = "image_features",
        label_field: str = "label",
    ):
        if not shots or min(shots) < 1 or seeds < 1:
            raise UserError(f"shots={tuple(shots)} and seeds={seeds} must be at least 1")
        probes.check_grid(grid)
        self._shots, self._seeds, self._grid = tuple(shots), tuple(range(seeds)), tuple(grid)
        self._splits = FeatureSplits(resources, data, train_data, label_field, features)

    def outcome(self, params: Any) -> FewShotOutcome:
        """Fits and scores every draw; raises UserError if a class has too few training images."""
        features = self._splits(params)
        accuracy = np.zeros((len(self._shots), len(self._seeds)))
        l2 = np.zeros(accuracy.shape)
        for i, shots in enumerate(self._shots):
            for j, seed in enumerate(self._seeds):
                rows = probes.few_per_class(features.train_labels, shots, seed)
                train, test = probes.standardize(features.train[rows], features.test)
                labels = features.train_labels[rows]
                fitted, l2[i, j] = probes.fit_ridge(train, labels, features.classes, self._grid)
                accuracy[i, j] = probes.accuracy(fitted(test), features.test_labels)
        return FewShotOutcome(features, self._shots, self._seeds, accuracy, l2, self._grid)


@dataclasses.dataclass(frozen=True, eq=False)
class KnnOutcome(FeaturesOutcome):
    """The class that the nearest `ks` neighbours predict for every test example, int64 [ks, n]."""

    ks: tuple[int, ...]
    predictions: Int[np.ndarray, "ks n"]
    temperature: float

    saved = ("ks", "predictions", "temperature")

    def scores(self) -> dict[str, float]:
        """Computes `top1_kK` in [0, 1] for each k, `examples`, `train_examples`, `classes`."""
        hits = self.predictions == self.features.test_labels
        return {
            **{f"top1_k{k}": float(row.mean()) for k, row in zip(self.ks, hits, strict=True)},
            **self.counts(),
        }


class Knn(Evaluator):
    """Scores a weighted vote of the k nearest training examples by cosine, by exact search.

    Args:
      data: test images, with the class as an integer in `label_field`.
      train_data: differences from `data` for the training images, such as {"split": "train"}.
      ks: numbers of neighbours that vote; each is scored.
      temperature: the weight of a neighbour is exp(cosine / temperature).
      features: name of the objective's function that computes features, which are normalized here.

    Raises:
      UserError: a value out of range, or the objective lacks the function.
    """

    needs = ()

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        train_data: Mapping[str, Any],
        resources: Resources,
        ks: Sequence[int] = (1, 5, 20),
        temperature: float = 0.07,
        features: str = "image_features",
        label_field: str = "label",
    ):
        if not ks or min(ks) < 1 or temperature <= 0:
            raise UserError(
                f"ks={tuple(ks)} must be at least 1 and temperature={temperature} above 0"
            )
        self._ks, self._temperature = tuple(ks), temperature
        self._splits = FeatureSplits(resources, data, train_data, label_field, features)

    def outcome(self, params: Any) -> KnnOutcome:
        """Predicts the whole test split; UserError for fewer training examples than neighbours."""
        splits = self._splits(params)
        if len(splits.train) < max(self._ks):
            raise UserError(
                f"ks={self._ks}, but train_data has {len(splits.train)} examples: raise its limit"
            )
        splits = dataclasses.replace(splits, train=_unit(splits.train), test=_unit(splits.test))
        predictions = neighbours.predictions(
            splits.test, splits.train, splits.train_labels, self._ks, self._temperature
        )
        return KnnOutcome(splits, self._ks, predictions, self._temperature)


def _unit(x: np.ndarray) -> np.ndarray:
    # The bound keeps a vector of zeros as it is, where 0 / 0 would give NaN.
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

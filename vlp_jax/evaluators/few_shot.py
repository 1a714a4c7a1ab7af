"""Few-shot classification: ridge regression on a few images of each class."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from vlp_jax.errors import UserError
from vlp_jax.evaluators import probes
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.frozen_features import FeatureSplits, FrozenFeatures

L2_GRID = tuple(10.0**power for power in range(-3, 5))


@dataclasses.dataclass(frozen=True, eq=False)
class FewShotOutcome(Outcome):
    """The accuracy of each draw of training images.

    Attributes:
      features: features and labels of both splits.
      shots: numbers of images per class.
      seeds: seeds of the draws.
      accuracy: top-1 on the test split, float64 [shots, seeds].
      l2: the chosen regularization, float64 [shots, seeds].
      grid: the values to choose from.
    """

    features: FrozenFeatures
    shots: tuple[int, ...]
    seeds: tuple[int, ...]
    accuracy: Float[np.ndarray, "shots seeds"]
    l2: Float[np.ndarray, "shots seeds"]
    grid: tuple[float, ...]

    def scores(self) -> dict[str, float]:
        """Computes `top1_Nshot` and `top1_Nshot_std` for each N, `seeds`, `examples`, `classes`.

        Top-1 is the mean over the draws, in [0, 1]; `std` is the population's, over the draws.
        """
        scores = {}
        for shots, row in zip(self.shots, self.accuracy, strict=True):
            scores[f"top1_{shots}shot"] = float(row.mean())
            scores[f"top1_{shots}shot_std"] = float(row.std())
        return {
            **scores,
            "seeds": float(len(self.seeds)),
            "examples": float(len(self.features.test)),
            "classes": float(self.features.classes),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays for `save_embeddings`."""
        return {
            **self.features.arrays(),
            "shots": np.array(self.shots),
            "seeds": np.array(self.seeds),
            "accuracy": self.accuracy,
            "l2": self.l2,
            "grid": np.array(self.grid),
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
        if not len(grid) or min(grid) <= 0:
            raise UserError(f"grid needs numbers above 0, got {tuple(grid)}")
        self._shots, self._seeds, self._grid = tuple(shots), tuple(range(seeds)), tuple(grid)
        self._splits = FeatureSplits(resources, data, train_data, label_field, features)

    def outcome(self, params: Any) -> FewShotOutcome:
        """Fits every draw, and scores it on the whole test split.

        Raises:
          UserError: a class has fewer training images than a number of shots.
        """
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

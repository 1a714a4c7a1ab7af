"""Classifies images by their nearest neighbours in a training split (Wu et al. 2018, 3.4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int

from vlp_jax.errors import UserError
from vlp_jax.evaluators import neighbours
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.frozen_features import FeatureSplits, FrozenFeatures


@dataclasses.dataclass(frozen=True, eq=False)
class KnnOutcome(Outcome):
    """The predicted class of every test example.

    Attributes:
      features: unit vectors and labels of both splits.
      ks: numbers of neighbours that vote.
      predictions: int64 [ks, n].
      temperature: temperature of the votes.
    """

    features: FrozenFeatures
    ks: tuple[int, ...]
    predictions: Int[np.ndarray, "ks n"]
    temperature: float

    def scores(self) -> dict[str, float]:
        """Computes `top1_kK` in [0, 1] for each k, `examples`, `train_examples`, `classes`."""
        hits = self.predictions == self.features.test_labels
        return {
            **{f"top1_k{k}": float(row.mean()) for k, row in zip(self.ks, hits, strict=True)},
            "examples": float(len(self.features.test)),
            "train_examples": float(len(self.features.train)),
            "classes": float(self.features.classes),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays for `save_embeddings`."""
        return {
            **self.features.arrays(),
            "ks": np.array(self.ks),
            "predictions": self.predictions,
            "temperature": np.array(self.temperature),
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
        """Predicts the classes of the whole test split.

        Raises:
          UserError: there are fewer training examples than neighbours.
        """
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

"""Classification by the nearest neighbours in a training split (Wu et al. 2018, 3.4)."""

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
    """What the neighbours say of every test example.

    Attributes:
      features: unit vectors of both splits, and their labels.
      ks: how many neighbours vote.
      predictions: int64 [ks, n].
      temperature: of the votes.
    """

    features: FrozenFeatures
    ks: tuple[int, ...]
    predictions: Int[np.ndarray, "ks n"]
    temperature: float

    def scores(self) -> dict[str, float]:
        """`top1_kK` in [0, 1] for each k, `examples`, `train_examples`, `classes`."""
        hits = self.predictions == self.features.test_labels
        return {
            **{f"top1_k{k}": float(row.mean()) for k, row in zip(self.ks, hits, strict=True)},
            "examples": float(len(self.features.test)),
            "train_examples": float(len(self.features.train)),
            "classes": float(self.features.classes),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save_embeddings` writes."""
        return {
            **self.features.arrays(),
            "ks": np.array(self.ks),
            "predictions": self.predictions,
            "temperature": np.array(self.temperature),
        }


class Knn(Evaluator):
    """Weighted vote of the k nearest training examples by cosine, exact.

    Args:
      data: of the test images, with the class as an integer in `label_field`.
      train_data: what differs from `data` for the training images, such as {"split": "train"}.
      ks: how many neighbours vote; each k is scored.
      temperature: a neighbour counts exp(cosine / temperature).
      features: the function of the objective that gives them; they are normalized.

    Raises:
      UserError: a value that cannot be used, or features that the objective lacks.
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
        """Predictions for the whole test split.

        Raises:
          UserError: there are fewer training examples than neighbours.
        """
        found = self._splits(params)
        if len(found.train) < max(self._ks):
            raise UserError(
                f"ks={self._ks}, but train_data has {len(found.train)} examples: raise its limit"
            )
        found = dataclasses.replace(found, train=_unit(found.train), test=_unit(found.test))
        predictions = neighbours.predictions(
            found.test, found.train, found.train_labels, self._ks, self._temperature
        )
        return KnnOutcome(found, self._ks, predictions, self._temperature)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)

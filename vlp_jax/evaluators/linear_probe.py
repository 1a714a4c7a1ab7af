"""Linear probing: a linear classifier trained on frozen features (Radford et al. 2021, A.3)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators import classification, probes
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.frozen_features import FeatureSplits, FrozenFeatures

METHODS = ("lbfgs", "sgd")
LEARNING_RATES = (0.01, 0.1, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbeOutcome(Outcome):
    """The classifier that was fitted, and what it makes of the test split.

    Attributes:
      features: of both splits, and their labels.
      logits: float64 [n, classes], of the test examples.
      method: "lbfgs" or "sgd".
      chosen: the regularization (lbfgs) or the learning rate (sgd).
      tried: value -> top-1 on the part of the training split that was held out.
      settings: of the fit: holdout, seed, max_iterations, epochs, batch_size.
    """

    features: FrozenFeatures
    logits: Float[np.ndarray, "n classes"]
    method: str
    chosen: float
    tried: Mapping[float, float]
    settings: Mapping[str, float]

    @cached_property
    def ranks(self) -> Int[np.ndarray, " n"]:
        """How many other classes score at least as high as the right one; 0 is a hit."""
        return classification.label_ranks(self.logits, self.features.test_labels)

    def scores(self) -> dict[str, float]:
        """`top1` and `top5` in [0, 1], `l2` or `learning_rate` as chosen and its `holdout_top1`,
        `examples`, `train_examples`, `classes`."""
        chosen = {"lbfgs": "l2", "sgd": "learning_rate"}[self.method]
        return {
            "top1": classification.top_k(self.ranks, 1),
            "top5": classification.top_k(self.ranks, 5),
            chosen: self.chosen,
            "holdout_top1": self.tried[self.chosen],
            "examples": float(len(self.features.test)),
            "train_examples": float(len(self.features.train)),
            "classes": float(self.features.classes),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """What `save_embeddings` writes."""
        settings = {name: np.array(value) for name, value in self.settings.items()}
        return {
            **self.features.arrays(),
            "logits": self.logits,
            "method": np.array(self.method),
            "chosen": np.array(self.chosen),
            "tried": np.array(sorted(self.tried.items())),
            **settings,
        }


class LinearProbe(Evaluator):
    """A linear classifier on frozen features: how much of the classes they say, linearly.

    A part of the training split is held out to choose how it is fitted; then it is fitted on the
    whole training split, and scored on the test split.

    Args:
      data: of the test images, with the class as an integer in `label_field`.
      train_data: what differs from `data` for the images to train on, such as {"split": "train"}.
      method: "lbfgs" (logistic regression to its optimum) or "sgd" (mini-batches, on standardized
        features, on the device).
      features: the function of the objective that gives them.
      grid: strengths of l2 regularization (lbfgs; default: `probes.search_l2`) or learning rates
        (sgd; default: 0.01, 0.1 and 1).
      holdout: share of the training split that is held out.
      max_iterations: of each fit of lbfgs.
      epochs, batch_size: of sgd alone.
      seed: of what is held out, and of the order of sgd's batches.

    Raises:
      UserError: a value that cannot be used, or features that the objective lacks.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {"grid": (100.0, 1000.0), "max_iterations": 10}
    needs = ()

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        train_data: Mapping[str, Any],
        resources: Resources,
        method: str = "lbfgs",
        features: str = "image_features",
        label_field: str = "label",
        grid: Sequence[float] | None = None,
        holdout: float = 0.2,
        max_iterations: int = 1000,
        epochs: int = 20,
        batch_size: int = 512,
        seed: int = 0,
    ):
        if method not in METHODS:
            raise UserError(unknown_key_message(str(method), METHODS, "method"))
        if grid is not None and (not len(grid) or min(grid) <= 0):
            raise UserError(f"grid needs numbers above 0, got {tuple(grid)}")
        counts = {"max_iterations": max_iterations, "epochs": epochs, "batch_size": batch_size}
        for key, value in counts.items():
            if value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        self._max_iterations = max_iterations
        self._method, self._grid, self._holdout, self._seed = method, grid, holdout, seed
        self._sgd = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
        self._splits = FeatureSplits(resources, data, train_data, label_field, features)

    def outcome(self, params: Any) -> LinearProbeOutcome:
        """Fits, and classifies the whole test split.

        Raises:
          UserError: the training split is too small to hold a part out, or has one class.
        """
        features = self._splits(params)
        fit = {"lbfgs": self._lbfgs, "sgd": self._by_sgd}[self._method]
        logits, chosen, tried = fit(features)
        settings = {
            "holdout": self._holdout,
            "max_iterations": self._max_iterations,
            **self._sgd,
        }
        return LinearProbeOutcome(features, logits, self._method, chosen, tried, settings)

    def _lbfgs(self, f: FrozenFeatures) -> tuple[np.ndarray, float, dict[float, float]]:
        kept, held = probes.hold_out(len(f.train), self._holdout, self._seed)

        def fit(x: np.ndarray, labels: np.ndarray, l2: float) -> probes.LinearClassifier:
            return probes.fit_logistic(x, labels, f.classes, l2, self._max_iterations)

        def score(l2: float) -> float:
            fitted = fit(f.train[kept], f.train_labels[kept], l2)
            return probes.accuracy(fitted(f.train[held]), f.train_labels[held])

        chosen, tried = probes.search_l2(score, self._grid)
        return fit(f.train, f.train_labels, chosen)(f.test), chosen, tried

    def _by_sgd(self, f: FrozenFeatures) -> tuple[np.ndarray, float, dict[float, float]]:
        kept, held = probes.hold_out(len(f.train), self._holdout, self._seed)
        rates = tuple(self._grid or LEARNING_RATES)
        part, held_out = probes.standardize(f.train[kept], f.train[held])
        fitted = probes.fit_sgd(part, f.train_labels[kept], f.classes, rates, **self._sgd)
        held_labels = f.train_labels[held]
        tried = {
            rate: probes.accuracy(model(held_out), held_labels)
            for rate, model in zip(rates, fitted, strict=True)
        }
        chosen = max(tried, key=lambda rate: (tried[rate], -rate))
        train, test = probes.standardize(f.train, f.test)
        (model,) = probes.fit_sgd(train, f.train_labels, f.classes, (chosen,), **self._sgd)
        return model(test), chosen, tried

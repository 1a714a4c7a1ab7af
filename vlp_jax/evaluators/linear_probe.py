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
from vlp_jax.evaluators.base import Evaluator, Resources
from vlp_jax.evaluators.frozen_features import FeaturesOutcome, FeatureSplits, FrozenFeatures

METHODS = ("lbfgs", "sgd")
LEARNING_RATES = (0.01, 0.1, 1.0)


@dataclasses.dataclass(frozen=True, eq=False)
class LinearProbeOutcome(FeaturesOutcome):
    """The logits of a linear classifier, fitted by `method`, on the test split.

    `chosen` is the regularization (lbfgs) or learning rate (sgd); `tried` has each value's top-1 on
    the held-out part of the training split. `settings` are holdout, seed, max_iterations, epochs
    and batch_size.
    """

    logits: Float[np.ndarray, "n classes"]
    method: str
    chosen: float
    tried: Mapping[float, float]
    settings: Mapping[str, float]

    saved = ("logits", "method", "chosen")

    @cached_property
    def ranks(self) -> Int[np.ndarray, " n"]:
        """For each example the number of classes that beat the right one; 0 is a hit."""
        return classification.label_ranks(self.logits, self.features.test_labels)

    def scores(self) -> dict[str, float]:
        """Computes `top1`, `top5` in [0, 1], the chosen `l2` or `learning_rate`, and counts.

        `holdout_top1` is the score that chose the value.
        """
        chosen = {"lbfgs": "l2", "sgd": "learning_rate"}[self.method]
        return {
            "top1": classification.top_k(self.ranks, 1),
            "top5": classification.top_k(self.ranks, 5),
            chosen: self.chosen,
            "holdout_top1": self.tried[self.chosen],
            **self.counts(),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the fields `saved`, settings, and the values that were tried with scores."""
        settings = {name: np.array(value) for name, value in self.settings.items()}
        return {**super().arrays(), "tried": np.array(sorted(self.tried.items())), **settings}


class LinearProbe(Evaluator):
    """Scores a linear classifier on frozen features.

    A held-out part of the training split chooses the regularization or the learning rate. Then the
    classifier is fitted on the whole training split, and scored on the test split.

    Args:
      data: test images, with the class as an integer in `label_field`.
      train_data: differences from `data` for the training images, such as {"split": "train"}.
      method: "lbfgs" (logistic regression to its optimum) or "sgd" (mini-batches of standardized
        features, on the device).
      features: name of the objective's function that computes features.
      grid: strengths of l2 regularization (lbfgs; default: `probes.search_l2`) or learning rates
        (sgd; default: 0.01, 0.1 and 1).
      holdout: share of the training split that is held out.
      max_iterations: largest number of iterations of a fit (lbfgs).
      epochs, batch_size: settings of sgd.
      seed: seed of the held-out part, and of the order of sgd's batches.

    Raises:
      UserError: a value out of range, or the objective lacks the function.
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
        if grid is not None:
            probes.check_grid(grid)
        counts = {"max_iterations": max_iterations, "epochs": epochs, "batch_size": batch_size}
        for key, value in counts.items():
            if value < 1:
                raise UserError(f"{key}={value} must be at least 1")
        self._max_iterations = max_iterations
        self._method, self._grid, self._holdout, self._seed = method, grid, holdout, seed
        self._sgd = {"epochs": epochs, "batch_size": batch_size, "seed": seed}
        self._splits = FeatureSplits(resources, data, train_data, label_field, features)

    def outcome(self, params: Any) -> LinearProbeOutcome:
        """Fits the classifier, and scores the test split; raises UserError for too little data."""
        features = self._splits(params)
        fit = {"lbfgs": self._lbfgs, "sgd": self._by_sgd}[self._method]
        logits, chosen, tried = fit(features)
        settings = {"holdout": self._holdout, "max_iterations": self._max_iterations, **self._sgd}
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
        chosen = max(tried, key=lambda rate: (tried[rate], -rate))  # of equal ones the lowest rate
        # The final fit uses the held-out part too, so its mean and deviation are other ones.
        train, test = probes.standardize(f.train, f.test)
        (model,) = probes.fit_sgd(train, f.train_labels, f.classes, (chosen,), **self._sgd)
        return model(test), chosen, tried

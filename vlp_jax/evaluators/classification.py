"""Computes scores of a classifier from its logits, in NumPy: ranks, calibration, likelihood.

Sums over examples are in float64, so the scores do not depend on batches or devices.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

CALIBRATION_BINS = 15  # Guo et al. 2017, section 5


def label_ranks(
    logits: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> Int[np.ndarray, " n"]:
    """Counts the other classes that score at least as high as the right one; 0 is a hit.

    Ties count against the model, or a model with equal scores for all classes would be right. So
    does a score that is NaN. Raises ValueError for a label that is not in [0, classes).
    """
    if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
        span = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"labels go from {span}, and there are {logits.shape[1]} classes")
    right = np.take_along_axis(logits, labels[:, None].astype(int), axis=1)
    # Not `logits >= right`, which is False for NaN.
    return (~(logits < right)).sum(axis=1) - 1


def top_k(ranks: Int[np.ndarray, " n"], k: int) -> float:
    """Returns the share of examples whose class is among the k highest, in [0, 1]."""
    return float((ranks < k).mean())


def mean_per_class_recall(ranks: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"]) -> float:
    """Computes the top-1 of each class that occurs, and averages over these classes; in [0, 1]."""
    counts = np.bincount(labels)
    hits = np.bincount(labels[ranks < 1], minlength=len(counts))
    present = counts > 0
    return float((hits[present] / counts[present]).mean())


def log_softmax(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n classes"]:
    """Computes the logarithms of the softmax, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def negative_log_likelihood(
    log_probabilities: Float[np.ndarray, "n classes"], labels: Int[np.ndarray, " n"]
) -> float:
    """Computes the mean of -log p(right class), in nats."""
    return float(-np.take_along_axis(log_probabilities, labels[:, None], axis=1).mean())


def calibration_bins(
    confidences: Float[np.ndarray, " n"], hits: np.ndarray, bins: int = CALIBRATION_BINS
) -> tuple[Int[np.ndarray, " bins"], Float[np.ndarray, " bins"], Float[np.ndarray, " bins"]]:
    """Divides (0, 1] into `bins` equal bins by confidence.

    A bin includes its upper end and not its lower end (Guo et al. 2017, section 2).

    Args:
      confidences: the probability of the predicted class.
      hits: bool [n], whether the predicted class is right.

    Returns:
      Number of examples, mean confidence and accuracy of each bin; 0 for empty bins.
    """
    edges = np.linspace(0, 1, bins + 1)[1:-1]
    place = np.searchsorted(edges, confidences, side="left")
    counts = np.bincount(place, minlength=bins)
    divisor = np.maximum(counts, 1)
    confidence = np.bincount(place, weights=confidences, minlength=bins) / divisor
    accuracy = np.bincount(place, weights=hits.astype(np.float64), minlength=bins) / divisor
    return counts, confidence, accuracy


def calibration_error(
    confidences: Float[np.ndarray, " n"], hits: np.ndarray, bins: int = CALIBRATION_BINS
) -> float:
    """Computes the expected calibration error, in [0, 1] (Guo et al. 2017, eq. 3).

    It is the gap between confidence and accuracy in each bin, weighted by the bin's examples.
    """
    counts, confidence, accuracy = calibration_bins(confidences, hits, bins)
    return float((counts * np.abs(accuracy - confidence)).sum() / counts.sum())

"""Scores of classifiers against scikit-learn, and calibration against a plain loop."""

import numpy as np
import pytest
from sklearn import metrics

from vlp_jax.evaluators import classification

N, CLASSES = 500, 12


@pytest.fixture(scope="module")
def world():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES - 1, N) ** 2 // (CLASSES - 2)  # uneven, and some are missing
    logits = rng.normal(size=(N, CLASSES)).astype(np.float32) * 3
    logits[np.arange(N), labels] += 2 + 2 * (labels == 0)
    return logits, labels


def test_top_k_and_recall_equal_scikit_learn(world):
    logits, labels = world
    ranks = classification.label_ranks(logits, labels)
    for k in (1, 5):
        expected = metrics.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(CLASSES))
        assert classification.top_k(ranks, k) == pytest.approx(expected, abs=1e-12)
    expected = metrics.recall_score(
        labels, logits.argmax(1), average="macro", labels=np.unique(labels)
    )
    found = classification.mean_per_class_recall(ranks, labels)
    assert found == pytest.approx(expected, abs=1e-12)
    assert abs(found - classification.top_k(ranks, 1)) > 1e-3  # classes are uneven
    assert len(np.unique(labels)) < CLASSES


def test_likelihood_equals_scikit_learn(world):
    logits, labels = world
    log_p = classification.log_softmax(logits)
    expected = metrics.log_loss(labels, np.exp(log_p), labels=np.arange(CLASSES))
    assert classification.negative_log_likelihood(log_p, labels) == pytest.approx(expected)
    from scipy.special import log_softmax

    np.testing.assert_allclose(log_p, log_softmax(logits.astype(np.float64), axis=1), atol=1e-12)
    huge = classification.log_softmax(np.array([[1e4, 0.0]], np.float32))
    assert np.isfinite(huge).all()


def calibration_by_a_loop(confidences, hits, bins):
    error = 0.0
    for m in range(bins):
        inside = [i for i, c in enumerate(confidences) if m / bins < c <= (m + 1) / bins]
        if inside:
            accuracy = sum(bool(hits[i]) for i in inside) / len(inside)
            confidence = sum(float(confidences[i]) for i in inside) / len(inside)
            error += len(inside) / len(confidences) * abs(accuracy - confidence)
    return error


@pytest.mark.parametrize("bins", [15, 10, 1])
def test_calibration_error_equals_a_loop(world, bins):
    logits, labels = world
    for scale in (0.1, 1, 20):
        p = np.exp(classification.log_softmax(logits * scale))
        hits, confidences = p.argmax(1) == labels, p.max(1)
        found = classification.calibration_error(confidences, hits, bins)
        expected = calibration_by_a_loop(confidences, hits, bins)
        assert found == pytest.approx(expected, abs=1e-9)
    edges = np.array([1 / 15, 2 / 15, 1.0])
    assert classification.calibration_bins(edges, np.ones(3))[0].tolist() == [1, 1, *[0] * 12, 1]


def test_a_calibrated_classifier_has_no_error():
    rng = np.random.default_rng(1)
    confidences = rng.uniform(0.3, 1, 200_000)
    hits = rng.uniform(size=len(confidences)) < confidences
    assert classification.calibration_error(confidences, hits) < 0.01
    assert classification.calibration_error(np.sqrt(confidences), hits) > 0.05


def test_ties_are_no_success_and_labels_are_checked():
    ranks = classification.label_ranks(np.zeros((4, 3), np.float32), np.array([0, 1, 2, 0]))
    assert ranks.tolist() == [2, 2, 2, 2]
    with pytest.raises(ValueError, match="from 0 to 3, and there are 3 classes"):
        classification.label_ranks(np.zeros((2, 3), np.float32), np.array([0, 3]))

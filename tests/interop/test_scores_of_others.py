"""Zero-shot and retrieval scores against CLIP_benchmark's and open_clip's own functions."""

import numpy as np
import pytest
import torch

from vlp_jax.evaluators import classification
from vlp_jax.evaluators.ranking import rank_both_ways

REASON = "not installed: pip install -r requirements-test.txt"


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


@pytest.fixture
def scalars(monkeypatch):
    """`accuracy` of both makes a float of an array with one element, which NumPy 2.4 refuses."""
    numpy = torch.Tensor.numpy
    monkeypatch.setattr(torch.Tensor, "numpy", lambda self: numpy(self.squeeze()))


@pytest.mark.parametrize("k", [1, 5, 10])
def test_recall_is_clip_benchmarks(k):
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval", reason=REASON)
    rng = np.random.default_rng(k)
    owners = np.repeat(np.arange(60), rng.integers(1, 7, 60))
    image, text = unit(rng.normal(size=(60, 8))), unit(rng.normal(size=(len(owners), 8)))
    text = unit(text + image[owners])
    scores = torch.tensor(text) @ torch.tensor(image).T
    positive = torch.tensor(owners[:, None] == np.arange(60))
    by_image, by_text = rank_both_ways(image, text, owners, 7, 20)
    for ranks, matrix, pairs in ((by_text, scores, positive), (by_image, scores.T, positive.T)):
        recall = theirs.batchify(theirs.recall_at_k, matrix, pairs, 16, "cpu", k=k)
        expected = (recall > 0).double().mean().item()
        assert ranks.recall(k) == pytest.approx(expected, abs=1e-9) and 0 < expected < 1


def test_ranks_are_open_clips():
    theirs = pytest.importorskip("open_clip_train.train", reason=REASON)
    rng = np.random.default_rng(0)
    image = unit(rng.normal(size=(101, 8)))
    text = unit(image + rng.normal(size=(101, 8)) / 2)
    metrics = theirs.get_clip_metrics(torch.tensor(image), torch.tensor(text), torch.tensor(50.0))
    by_way = rank_both_ways(image, text, np.arange(101))
    for name, ranks in zip(("image_to_text", "text_to_image"), by_way, strict=True):
        assert ranks.ranks().mean() == pytest.approx(metrics[f"{name}_mean_rank"])
        assert ranks.median() == metrics[f"{name}_median_rank"]
        for k in (1, 5, 10):
            assert ranks.recall(k) == pytest.approx(metrics[f"{name}_R@{k}"], abs=1e-9)


@pytest.mark.parametrize(
    ("module", "total"),
    [("clip_benchmark.metrics.zeroshot_classification", 1), ("open_clip_train.zero_shot", 300)],
)
def test_accuracy_is_that_of_both(module, total, scalars):
    theirs = pytest.importorskip(module, reason=REASON)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 20, 300)
    logits = rng.normal(size=(300, 20)).astype(np.float32)
    logits[np.arange(300), labels] += 1
    ranks = classification.label_ranks(logits, labels)
    expected = theirs.accuracy(torch.tensor(logits), torch.tensor(labels), topk=(1, 5))
    found = [classification.top_k(ranks, k) for k in (1, 5)]
    np.testing.assert_allclose(found, np.array(expected) / total, atol=1e-9)


def test_mean_per_class_recall_is_clip_benchmarks(scalars):
    """As its `evaluate` has it: scikit-learn's balanced accuracy."""
    theirs = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification", reason=REASON)
    rng = np.random.default_rng(1)
    labels, logits = rng.integers(0, 6, 200) ** 2 // 6, rng.normal(size=(200, 6))
    logits[np.arange(200), labels] += labels
    ranks = classification.label_ranks(logits, labels)
    expected = theirs.balanced_accuracy_score(labels, logits.argmax(1))
    assert classification.mean_per_class_recall(ranks, labels) == pytest.approx(expected)
    assert abs(expected - classification.top_k(ranks, 1)) > 0.01

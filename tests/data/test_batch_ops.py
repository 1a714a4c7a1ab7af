"""MixUp and CutMix against float64, and the distribution of their shares."""

import numpy as np
import pytest

from vlp_jax.data.batch_ops import BATCH_OPS, MixUp
from vlp_jax.errors import UserError


def batch(size=8, side=6, classes=5, seed=0):
    random = np.random.default_rng(seed)
    return {
        "image": random.integers(0, 256, (size, side, side + 2, 3), np.uint8),
        "label": random.integers(0, classes, size).astype(np.int32),
        "name": np.arange(size),
    }


def seeds(size=8, start=0):
    return np.stack([np.arange(start, start + size), -np.arange(size)], 1).astype(np.int32)


def shares(labels, soft):
    """How much each kept of itself, where the labels of a pair differ."""
    rows = np.flatnonzero(labels != labels[np.arange(len(labels)) ^ 1])
    return rows, soft[rows, labels[rows]].astype(np.float64)


def test_mixup_is_the_formula_in_float64():
    before = batch(64)
    after = BATCH_OPS["mixup"](alpha=0.8, num_classes=5)(before, seeds(64))
    assert after["image"].dtype == np.uint8 and after["label"].dtype == np.float32
    np.testing.assert_array_equal(after["name"], before["name"])
    np.testing.assert_allclose(after["label"].sum(1), 1, rtol=1e-6)
    rows, share = shares(before["label"], after["label"])
    assert len(rows) > 30
    own = before["image"][rows].astype(np.float64)
    other = before["image"][rows ^ 1].astype(np.float64)
    share = share[:, None, None, None]
    expected = share * own + (1 - share) * other
    assert np.abs(after["image"][rows] - expected).max() <= 0.5 + 1e-5
    onehot = np.eye(5)[before["label"]]
    expected = share[:, 0, 0] * onehot[rows] + (1 - share[:, 0, 0]) * onehot[rows ^ 1]
    np.testing.assert_allclose(after["label"][rows], expected, atol=1e-6)


def test_extremes_do_not_overflow():
    black_and_white = np.zeros((64, 4, 4, 3), np.uint8)
    black_and_white[::2] = 255
    before = {"image": black_and_white, "label": np.arange(64) % 2}
    after = MixUp(0.3, 2)(before, seeds(64))
    share = after["label"][::2, 0].astype(np.float64)
    assert np.abs(after["image"][::2, 0, 0, 0] - 255 * share).max() <= 0.5 + 1e-5
    np.testing.assert_array_equal(after["image"][::2] + after["image"][1::2], 255)


def test_shares_follow_beta_and_the_seed_alone():
    labels = np.arange(2000) % 2
    before = {"image": np.zeros((2000, 1, 1, 3), np.uint8), "label": labels}
    soft = MixUp(0.4, 2)(before, seeds(2000))["label"]
    share = soft[::2, 0].astype(np.float64)
    np.testing.assert_array_equal(soft[::2], soft[1::2, ::-1])
    assert abs(share.mean() - 0.5) < 0.04
    assert abs(share.var() - 1 / (4 * (2 * 0.4 + 1))) < 0.015
    half = {k: v[1000:] for k, v in before.items()}
    np.testing.assert_array_equal(MixUp(0.4, 2)(half, seeds(2000)[1000:])["label"], soft[1000:])
    assert len(np.unique(share)) > 100


def test_cutmix_exchanges_a_rectangle_and_weighs_its_area():
    before = batch(128, side=16)
    before["label"] = np.arange(128) % 2
    after = MixUp(0.0, 2, cutmix_alpha=1.0)(before, seeds(128))
    own, other = before["image"], before["image"][np.arange(128) ^ 1]
    kept = (after["image"] == own).all(-1)
    taken = (after["image"] == other).all(-1)
    assert (kept | taken).all()
    for row in range(128):
        places = np.argwhere(~kept[row])
        if len(places):
            sides = np.ptp(places, axis=0) + 1
            assert sides.prod() >= len(places) > 0.9 * sides.prod()
    share = after["label"][np.arange(128), before["label"]]
    np.testing.assert_allclose(share, kept.mean((1, 2)), atol=0.02)
    assert share.std() > 0.15
    both = MixUp(1.0, 2, cutmix_alpha=1.0)(before, seeds(128))["image"]
    exchanged = ((both == own) | (both == other)).all((1, 2, 3))
    assert 30 < exchanged.sum() < 98


def test_output_spec_is_what_comes_out():
    before = batch()
    op = MixUp(0.2, 5)
    spec = op.output_spec({k: (v.shape[1:], v.dtype) for k, v in before.items()})
    after = op(before, seeds())
    assert spec == {k: (v.shape[1:], v.dtype) for k, v in after.items()}


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        ({"alpha": -1.0}, {}, "alpha must be"),
        ({"alpha": 0}, {}, "both 0"),
        ({"num_classes": 1}, {}, "num_classes"),
        ({"num_classes": 4}, {"label": np.full(8, 4)}, "0 to 3"),
        ({"label_field": "class"}, {}, "label_field"),
        ({}, {"image": np.zeros((8, 4, 4, 3), np.float32)}, "uint8"),
        ({}, {k: v[:7] for k, v in batch().items()}, "even"),
    ],
)
def test_mistakes(settings, change, message):
    with pytest.raises(UserError, match=message) as caught:
        MixUp(**{"alpha": 0.2, "num_classes": 5, **settings})({**batch(), **change}, seeds())
    assert "\n" not in str(caught.value)

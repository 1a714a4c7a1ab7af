"""Ranks in blocks against what a sort of the whole matrix says, ties counted by hand."""

import itertools

import numpy as np
import pytest
import torch  # the sort of somebody else

from vlp_jax.evaluators.ranking import Ranks, rank_both_ways

RAGGED = (3, 1, 4, 1, 5, 2, 1, 1, 6, 2, 3, 1, 2)  # captions of each image


def unit(x):
    return (x / np.linalg.norm(x, axis=-1, keepdims=True)).astype(np.float32)


def world(counts=RAGGED, dim=6, seed=0):
    rng = np.random.default_rng(seed)
    owners = np.repeat(np.arange(len(counts)), counts)
    return (
        unit(rng.normal(size=(len(counts), dim))),
        unit(rng.normal(size=(len(owners), dim))),
        owners,
    )


def place_of_first(scores, own):
    """Number of the place of the first of `own` in the descending order of each row."""
    order = torch.argsort(torch.tensor(scores), dim=1, descending=True, stable=True).numpy()
    return np.array([np.flatnonzero(own[i][row])[0] for i, row in enumerate(order)])


@pytest.mark.parametrize("blocks", [(255, 8192), (1, 1), (4, 7), (13, 5), (300, 31)])
@pytest.mark.parametrize("counts", [RAGGED, (1,) * 20, (2, 300, 1)], ids=["ragged", "one", "many"])
def test_ranks_equal_a_sort_of_everything(counts, blocks):
    image, text, owners = world(counts)
    by_image, by_text = rank_both_ways(image, text, owners, *blocks)
    scores = image.astype(np.float64) @ text.astype(np.float64).T
    own = owners == np.arange(len(image))[:, None]
    for ranks, matrix, mine in ((by_image, scores, own), (by_text, scores.T, own.T)):
        place = place_of_first(matrix, mine)
        assert ranks.ranks().tolist() == (place + 1).tolist()
        for k in (1, 5, 10):
            assert ranks.recall(k) == pytest.approx(np.mean(place < k), abs=1e-12)
        assert ranks.median() == np.median(place + 1)
        assert ranks.mean_reciprocal() == pytest.approx(np.mean(1 / (place + 1)), abs=1e-12)
    assert by_image.recall(5) > 0 or counts[0] == 2


def test_the_order_of_texts_does_not_matter():
    image, text, owners = world()
    shuffled = np.random.default_rng(1).permutation(len(text))
    by_image, by_text = rank_both_ways(image, text, owners, 4, 7)
    again_image, again_text = rank_both_ways(image, text[shuffled], owners[shuffled], 5, 3)
    assert (again_image.ranks() == by_image.ranks()).all()
    assert (again_text.ranks() == by_text.ranks()[shuffled]).all()


def enumerated(scores, own, k):
    """Mean over all orders among equals: P(any own among the first k), E[rank], E[1 / rank]."""
    found, ranks, reciprocal = [], [], []
    for row, mine in zip(scores, own, strict=True):
        orders = [
            order
            for order in itertools.permutations(range(len(row)))
            if all(row[a] >= row[b] for a, b in itertools.pairwise(order))
        ]
        first = [min(place for place, j in enumerate(order) if mine[j]) + 1 for order in orders]
        found.append(np.mean([place <= k for place in first]))
        ranks.append(np.mean(first))
        reciprocal.append(np.mean([1 / place for place in first]))
    return found, ranks, np.mean(reciprocal)


@pytest.mark.parametrize("blocks", [(255, 8192), (2, 3)])
def test_equal_captions_are_worth_their_chance(blocks):
    # Captions 0, 2 and 5 are the same words, of images 0, 1 and 3; 6 is 4 once more. Image 3
    # looks exactly like image 2.
    image, text, _ = world((1,) * 7, dim=3)
    image = image[[0, 1, 2, 2]]
    text = text[[0, 1, 0, 3, 4, 0, 4]]
    owners = np.array([0, 0, 1, 2, 2, 3, 3])
    scores = np.round(image.astype(np.float64) @ text.astype(np.float64).T, 6)
    own = owners == np.arange(4)[:, None]
    for ranks, matrix, mine in zip(
        rank_both_ways(image, text, owners, *blocks), (scores, scores.T), (own, own.T), strict=True
    ):
        for k in (1, 2, 3, 5):
            found, expected, reciprocal = enumerated(matrix, mine, k)
            np.testing.assert_allclose(ranks.found(k), found, atol=1e-12)
        np.testing.assert_allclose(ranks.ranks(), expected, atol=1e-12)
        assert ranks.mean_reciprocal() == pytest.approx(reciprocal, abs=1e-12)
        assert (ranks.equal > 1).any()


def test_a_caption_ties_with_itself_in_every_block_and_never_beats_itself():
    """Rounding differs between places of a matrix product; equal captions must not see that."""
    rng = np.random.default_rng(0)
    images, dim = 300, 257  # no multiple of any register
    image = unit(rng.normal(size=(images, dim)))
    # Every image has its own caption, and every caption occurs three times, far apart.
    text = np.tile(image, (3, 1))
    owners = np.tile(np.arange(images), 3)
    for blocks in ((255, 8192), (7, 101), (64, 899)):
        by_image, by_text = rank_both_ways(image, text, owners, *blocks)
        assert (by_image.above == 0).all() and (by_text.above == 0).all()
        assert (by_image.equal == 3).all() and (by_image.own == 3).all()
        assert (by_text.equal == 1).all()
    # Now the two others belong to other images: three equal texts, one of which is right.
    owners = np.concatenate([np.arange(images), np.roll(np.arange(images), 1), np.arange(images)])
    by_image, _ = rank_both_ways(image, text, owners, 32, 100)
    assert (by_image.equal == 3).all() and (by_image.own == 2).all()
    assert by_image.recall(1) == pytest.approx(2 / 3)


@pytest.mark.parametrize("texts", [10, 30])
def test_a_collapsed_model_scores_chance(texts):
    image, text = np.ones((10, 4), np.float32) / 2, np.ones((texts, 4), np.float32) / 2
    owners = np.arange(texts) % 10
    by_image, by_text = rank_both_ways(image, text, owners, 3, 4)
    assert by_image.recall(1) == pytest.approx(0.1) and by_text.recall(1) == pytest.approx(0.1)
    assert by_text.recall(5) == pytest.approx(0.5) and by_text.median() == 5.5
    assert by_text.mean_reciprocal() == pytest.approx(np.mean(1 / np.arange(1, 11)))
    assert by_image.recall(texts) == 1


def test_zeros_of_either_sign_are_equal():
    image = np.array([[1, 0], [0, 1]], np.float32)
    text = np.array([[0.0, 1], [-0.0, 1]], np.float32)
    by_image, _ = rank_both_ways(image, text, np.arange(2))
    assert by_image.equal.tolist() == [2, 2]


def test_an_image_needs_a_text():
    image, text, _ = world((1, 1, 1))
    for owners in ([0, 1, 1], [0, 1, 3]):
        with pytest.raises(ValueError, match="every image at least once"):
            rank_both_ways(image, text, np.array(owners))


def test_found_is_a_probability_of_any_order():
    ranks = Ranks(np.array([0, 2, 5]), np.array([4, 3, 1]), np.array([2, 1, 1]))
    np.testing.assert_allclose(ranks.found(1), [2 / 4, 0, 0])
    np.testing.assert_allclose(ranks.found(2), [1 - (2 / 4) * (1 / 3), 0, 0])
    np.testing.assert_allclose(ranks.found(3), [1, 1 / 3, 0])
    np.testing.assert_allclose(ranks.found(6), [1, 1, 1])

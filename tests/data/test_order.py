"""The order of the stream: a permutation in every epoch, well mixed, and O(1) to seek in."""

import time

import numpy as np
import pytest

from vlp_jax.data.order import Order, example_seeds


@pytest.mark.parametrize("size", [*range(1, 70), 127, 128, 129, 1000, 4096, 4097, 99_991])
def test_every_epoch_is_a_permutation(size):
    order = Order(size, seed=3)
    for epoch in (0, 1, 12_345):
        indices = order.indices(np.arange(size) + epoch * size)
        np.testing.assert_array_equal(np.sort(indices), np.arange(size))


def test_epochs_and_seeds_differ_and_calls_repeat():
    positions = np.arange(1000)
    first = Order(1000, seed=0).indices(positions)
    np.testing.assert_array_equal(first, Order(1000, seed=0).indices(positions))
    others = [Order(1000, seed=0).indices(positions + 1000 * epoch) for epoch in range(1, 6)]
    others += [Order(1000, seed=seed).indices(positions) for seed in (1, -1, 2**40)]
    for other in others:
        assert np.mean(other == first) < 0.01
        assert abs(np.corrcoef(first, other)[0, 1]) < 5 / np.sqrt(1000)


def test_a_position_does_not_depend_on_what_it_is_asked_with():
    order = Order(37, seed=5)
    together = order.indices(np.arange(200))  # straddles epochs
    backwards = order.indices(np.arange(200)[::-1])[::-1]
    one_by_one = [order.indices(np.array([n]))[0] for n in range(200)]
    np.testing.assert_array_equal(together, backwards)
    np.testing.assert_array_equal(together, one_by_one)


def test_without_shuffling_examples_come_in_their_order():
    indices = Order(5, seed=9, shuffle=False).indices(np.arange(12))
    np.testing.assert_array_equal(indices, np.arange(12) % 5)


def _chi_square(values: np.ndarray, bins: int) -> float:
    counts = np.bincount(values, minlength=bins)
    expected = len(values) / bins
    return float(np.sum((counts - expected) ** 2 / expected))


@pytest.mark.parametrize("size", [3, 10, 64, 100])
def test_first_and_last_place_of_an_epoch_are_uniform(size):
    epochs = np.arange(20_000, dtype=np.int64)
    for place in (0, size - 1):
        values = Order(size, seed=1).indices(epochs * size + place)
        statistic = _chi_square(values, size)
        degrees = size - 1
        assert abs(statistic - degrees) < 5 * np.sqrt(2 * degrees)


def test_pairs_of_places_are_uniform_in_a_small_order():
    """The joint law of two places, which a weak network gets wrong although each is uniform."""
    epochs = np.arange(40_000, dtype=np.int64) * 8
    order = Order(8, seed=2)
    first, second = order.indices(epochs), order.indices(epochs + 1)
    assert not np.any(first == second)
    pairs = first * 7 + (second - (second > first))
    assert abs(_chi_square(pairs, 56) - 55) < 5 * np.sqrt(110)


def test_neighbours_are_not_correlated():
    size = 100_000
    indices = Order(size, seed=0).indices(np.arange(size))
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 5 / np.sqrt(size)
    fixed_points = np.sum(indices == np.arange(size))
    assert fixed_points < 10  # Poisson with mean 1
    # Displacements of neighbours, folded to 64 bins: uniform if no step repeats too often.
    steps = (indices[1:] - indices[:-1]) % size * 64 // size
    assert abs(_chi_square(steps, 64) - 63) < 6 * np.sqrt(126)


@pytest.mark.parametrize("size", [10**9, 2**40])
def test_seeking_is_instant_at_any_size(size):
    started = time.process_time()
    indices = Order(size, seed=7).indices(np.arange(4096) + size - 2048)
    assert time.process_time() - started < 0.5
    assert indices.min() >= 0 and indices.max() < size
    assert len(np.unique(indices[:2048])) == len(np.unique(indices[2048:])) == 2048


def test_bad_arguments():
    with pytest.raises(ValueError, match="size"):
        Order(0)
    with pytest.raises(ValueError, match="at least 0"):
        Order(5).indices(np.array([-1]))


def test_example_seeds_are_distinct_and_depend_on_position_alone():
    positions = np.arange(500)
    seeds = example_seeds(11, positions, 3)
    assert seeds.shape == (500, 3, 2) and seeds.dtype == np.int32
    assert len(np.unique(seeds.reshape(-1, 2), axis=0)) == 1500
    np.testing.assert_array_equal(seeds[123:130], example_seeds(11, positions[123:130], 3))
    np.testing.assert_array_equal(seeds[:, :1], example_seeds(11, positions, 1))
    assert not np.array_equal(seeds, example_seeds(12, positions, 3))
    bits = np.unpackbits(seeds.view(np.uint8)).mean()
    assert abs(bits - 0.5) < 0.01

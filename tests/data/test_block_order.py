"""The order of files that are read in blocks: a permutation, near in the files, instant to seek."""

import time

import numpy as np
import pytest

from vlp_jax.data.batch_reader import BatchShare, Mixture, Schedule
from vlp_jax.data.order import BlockOrder

SIZES = np.random.default_rng(0).integers(1, 60, 50)


@pytest.mark.parametrize("sizes", [[1], [3], [3, 5, 2], [1] * 17, SIZES])
@pytest.mark.parametrize("lanes, window", [(1, 1), (4, 3), (16, 64), (7, 33), (3, 10**6)])
def test_every_epoch_is_a_permutation(sizes, lanes, window):
    order = BlockOrder(np.array(sizes), 1, lanes, window)
    for epoch in (0, 1, 12_345):
        indices = order.indices(np.arange(order.size) + epoch * order.size)
        np.testing.assert_array_equal(np.sort(indices), np.arange(order.size))


def test_epochs_and_seeds_differ_and_positions_do_not_depend_on_each_other():
    order = BlockOrder(SIZES, 1, 4, 20)
    n = order.size
    positions = np.arange(3 * n)
    together = order.indices(positions)
    np.testing.assert_array_equal(together[::-1], order.indices(positions[::-1]))
    some = np.random.default_rng(0).integers(0, 3 * n, 50)
    assert [order.indices(np.array([p]))[0] for p in some] == together[some].tolist()
    for other in (together[n : 2 * n], BlockOrder(SIZES, 2, 4, 20).indices(positions[:n])):
        assert np.mean(other == together[:n]) < 0.02
        assert abs(np.corrcoef(other, together[:n])[0, 1]) < 0.2


def test_a_lane_has_few_blocks_open_and_lanes_share_at_most_one():
    sizes = np.full(400, 25)
    order = BlockOrder(sizes, 3, lanes=8, window=50)
    blocks = order.indices(np.arange(order.size)).reshape(-1, 8) // 25
    for lane in range(8):
        for first in range(0, len(blocks), 50):
            assert len(set(blocks[first : first + 50, lane])) <= 4
    owners = {}
    for lane in range(8):
        for block in set(blocks[:, lane]):
            owners.setdefault(block, set()).add(lane)
    assert sum(len(lanes) > 1 for lanes in owners.values()) <= 7


def test_neighbours_in_a_batch_come_from_all_over():
    order = BlockOrder(np.full(1000, 100), 0, lanes=16, window=400)
    batch = order.indices(np.arange(256))
    assert len(set(batch // 100)) > 40 and len(set(batch // 10_000)) == 10


@pytest.mark.slow
def test_seeking_to_a_billion_takes_seconds():
    """The synthetic index: 10^9 examples in 10,000 shards, of 256 to a block."""
    begin = time.process_time()
    order = BlockOrder(np.full(10**9 // 250, 250), 7, lanes=16, window=1000)
    schedule = Schedule(BatchShare(4096), Mixture(((1, 1),), 16))
    ((_, positions),) = schedule.of_batch((10**9 - 4096) // 4096, 1)
    indices = order.indices(positions)
    seconds = time.process_time() - begin
    assert len(set(indices)) == 4096 and indices.max() < 10**9
    assert seconds < 10, f"{seconds:.1f} s"
    begin = time.process_time()
    order.indices(positions - 10**6)
    assert time.process_time() - begin < 1


@pytest.mark.parametrize("lanes", [1, 8, 16])
@pytest.mark.parametrize("weights", [(1,), (3, 1, 2.5)])
def test_batches_are_one_plan_for_any_number_of_processes(lanes, weights):
    mixture = Mixture.of_weights(weights, lanes)
    for batch in (0, 1, 12_345):
        whole = Schedule(BatchShare(48), mixture).of_batch(batch, len(weights))
        assert sorted(np.concatenate([places for places, _ in whole])) == list(range(48))
        for processes in (1, 2, 4, 8):
            found = [[] for _ in weights]
            for index in range(processes):
                part = Schedule(BatchShare(48, index, processes), mixture)
                for source, (places, positions) in enumerate(part.of_batch(batch, len(weights))):
                    places = places + index * (48 // processes)
                    found[source] += zip(places.tolist(), positions.tolist(), strict=True)
            for source, (places, positions) in enumerate(whole):
                expected = list(zip(places.tolist(), positions.tolist(), strict=True))
                assert sorted(found[source]) == expected


def test_bad_arguments():
    with pytest.raises(ValueError, match="at least one example"):
        BlockOrder(np.array([3, 0]), 0, 1, 1)
    with pytest.raises(ValueError, match="lanes and window"):
        BlockOrder(np.array([3]), 0, 0, 1)
    with pytest.raises(ValueError, match="at least 0"):
        BlockOrder(np.array([3]), 0, 1, 1).indices(np.array([-1]))

"""Which example is read at which position of the training stream, as a pure function.

The stream of a run is endless: position n belongs to epoch n // size, and within an epoch the
positions run through a permutation of the examples that is computed, not stored. A run can
therefore start at any position at once, and the state of the input is one number whatever the
number of processes. Batches are cut from this stream without regard to the ends of epochs: where
the size of the data is not a multiple of the batch size, one batch holds the end of an epoch and
the beginning of the next, and no example is dropped or seen twice in an epoch.

The permutation is a keyed Feistel network (Luby and Rackoff 1988) on the next power of two, with
cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains") for the sizes
between. It is written in NumPy, so that it is the same with and without TensorFlow.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_ROUNDS = 8
# Very small domains have halves of one bit, of which there are too few distinct networks to
# shuffle well; walking in a domain of 64 costs little and gives 3-bit halves.
_MIN_BITS = 6
_MAX_SIZE = 2**60
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_SHUFFLE, _EXAMPLE = np.uint64(0x5EED0001), np.uint64(0x5EED0002)  # purposes, kept apart


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood 2014) on uint64 arrays of any shape."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _scramble(x: np.ndarray) -> np.ndarray:
    """A cheaper mixing for the rounds of the network, whose keys are mixed well already."""
    x = x * np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(32)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(29)
    return x


def _fold(key: np.ndarray, data: np.ndarray | np.uint64) -> np.ndarray:
    """A new key from a key and a number; both uint64, arrays that broadcast."""
    return _mix((key ^ _mix(data + _GOLDEN * np.ones_like(key))) + _GOLDEN)


def _root_key(seed: int, purpose: np.uint64) -> np.ndarray:
    return _fold(np.array([seed % 2**64], np.uint64), purpose)


def example_seeds(seed: int, positions: np.ndarray, count: int) -> np.ndarray:
    """Seeds for the random operations on the examples at `positions`.

    Args:
      seed: the seed of the run.
      positions: int64 [n], positions in the stream, at least 0.
      count: how many independent seeds an example needs.

    Returns:
      int32 [n, count, 2], each pair a seed for `tf.random.stateless_*`; a pure function of
      (seed, position, which of the `count`).
    """
    keys = _fold(_root_key(seed, _EXAMPLE), np.asarray(positions, np.int64).astype(np.uint64))
    keys = _fold(keys[:, None], np.arange(count, dtype=np.uint64)[None, :] + np.uint64(1))
    return np.ascontiguousarray(keys).view(np.int32).reshape(len(positions), count, 2)


@dataclass(frozen=True)
class Order:
    """The order of an endless stream over `size` examples.

    Attributes:
      size: number of examples, from 1 to 2^60.
      seed: seed of the shuffling; two seeds give unrelated orders.
      shuffle: False reads the examples 0, 1, ..., size - 1 in every epoch.
    """

    size: int
    seed: int = 0
    shuffle: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"an order needs a size from 1 to 2^60, got {self.size}")

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The examples at `positions`.

        Args:
          positions: int64 [n], each at least 0; they need not be sorted or of one epoch.

        Returns:
          int64 [n], each in [0, size). Every aligned run of `size` positions holds each example
          once. Time and memory do not depend on `size` or on the positions.

        Raises:
          ValueError: for a negative position.
        """
        positions = np.asarray(positions, np.int64)
        if positions.size and positions.min() < 0:
            raise ValueError(f"a position is at least 0, got {positions.min()}")
        epochs, places = np.divmod(positions, self.size)
        if not self.shuffle or self.size == 1:
            return places
        keys = _fold(_root_key(self.seed, _SHUFFLE), epochs.astype(np.uint64))
        keys = _fold(keys[None, :], np.arange(_ROUNDS, dtype=np.uint64)[:, None])
        values = self._network(places.astype(np.uint64), keys)
        outside = np.flatnonzero(values >= self.size)
        while outside.size:
            values[outside] = self._network(values[outside], keys[:, outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray, keys: np.ndarray) -> np.ndarray:
        """One pass of the Feistel network, a permutation of [0, 2^bits) for each key.

        `values` is uint64 [n], `keys` uint64 [rounds, n].
        """
        bits = max(_MIN_BITS, (self.size - 1).bit_length())
        low_bits = np.uint64(bits // 2)
        low_mask = np.uint64((1 << (bits // 2)) - 1)
        high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
        high, low = values >> low_bits, values & low_mask
        # The halves may differ by a bit, so they take turns instead of being swapped: each step
        # is its own inverse whatever the widths are.
        for even, odd in zip(keys[::2], keys[1::2], strict=True):
            low ^= _scramble(high + even) & low_mask
            high ^= _scramble(low + odd) & high_mask
        return (high << low_bits) | low

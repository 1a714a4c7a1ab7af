"""The order of examples in the training stream, as a pure function of seed and position.

The stream of a run is endless: position n belongs to epoch n // size, and within an epoch the
positions run through a permutation of the examples that is computed, not stored. A run can
therefore start at any position at once, and the state of the input is one number whatever the
number of processes. Batches are cut from this stream without regard to the ends of epochs: where
the size of the data is not a multiple of the batch size, one batch holds the end of an epoch and
the beginning of the next, and no example is dropped or seen twice in an epoch.

Files that are read by index are permuted example by example (`Order`). Files that are read best
from front to back are permuted block by block, and the examples of a few blocks at a time among
each other (`BlockOrder`); several lanes, each in another part of the data, feed every batch.

The permutation is a keyed Feistel network (Luby and Rackoff 1988) on the next power of two, with
cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary finite domains") for the sizes
between. It is written in NumPy, so that it is the same with and without TensorFlow.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

_ROUNDS = 8
# Very small domains have halves of one bit, of which there are too few distinct networks to
# shuffle well; walking in a domain of 64 costs little and gives 3-bit halves.
_MIN_BITS = 6
_MAX_SIZE = 2**60
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
# Purposes of keys, kept apart.
_SHUFFLE, _EXAMPLE, _BLOCKS = np.uint64(0x5EED0001), np.uint64(0x5EED0002), np.uint64(0x5EED0003)
OPERATIONS, BATCH_OPERATIONS = _EXAMPLE, np.uint64(0x5EED0004)


def _mix(x: np.ndarray) -> np.ndarray:
    """Mixes uint64 arrays of any shape (finalizer of SplitMix64, Steele, Lea and Flood 2014)."""
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


def example_seeds(
    seed: int, positions: np.ndarray, count: int, purpose: np.uint64 = OPERATIONS
) -> np.ndarray:
    """Seeds for the random operations on the examples at `positions`, int64 [n].

    Args:
      count: how many independent seeds an example needs.
      purpose: `OPERATIONS` or `BATCH_OPERATIONS`.

    Returns:
      int32 [n, count, 2], each pair a seed for `tf.random.stateless_*`; a pure function of
      (seed, position, which of the `count`).
    """
    keys = _fold(_root_key(seed, purpose), np.asarray(positions, np.int64).astype(np.uint64))
    keys = _fold(keys[:, None], np.arange(count, dtype=np.uint64)[None, :] + np.uint64(1))
    return np.ascontiguousarray(keys).view(np.int32).reshape(len(positions), count, 2)


def _permute(values: np.ndarray, size: int, keys: np.ndarray) -> np.ndarray:
    """Permutes each of `values`, int64 [n] in [0, size), by its own key, uint64 [n]."""
    if size == 1:
        return values
    rounds = _fold(keys[None, :], np.arange(_ROUNDS, dtype=np.uint64)[:, None])
    result = _network(values.astype(np.uint64), rounds, size)
    # The network permutes a power of two. A value that leaves [0, size) walks on along its cycle
    # until it comes back, which keeps the map a permutation of [0, size).
    outside = np.flatnonzero(result >= size)
    while outside.size:
        result[outside] = _network(result[outside], rounds[:, outside], size)
        outside = outside[result[outside] >= size]
    return result.astype(np.int64)


def _network(values: np.ndarray, keys: np.ndarray, size: int) -> np.ndarray:
    """One pass of the Feistel network, a permutation of [0, 2^bits) for each key, 2^bits >= size.

    `values` is uint64 [n], `keys` uint64 [rounds, n].
    """
    bits = max(_MIN_BITS, (size - 1).bit_length())
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


def _epochs_and_places(positions: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
    positions = np.asarray(positions, np.int64)
    if positions.size and positions.min() < 0:
        raise ValueError(f"a position is at least 0, got {positions.min()}")
    return np.divmod(positions, size)


@dataclass(frozen=True)
class Order:
    """The order of an endless stream over `size` examples (at most 2^60) that are read by index.

    Position n belongs to lane n % `lanes`. Time and memory of `indices` do not depend on `size`.
    With `shuffle` False every epoch reads the examples 0, 1, ..., size - 1.
    """

    size: int
    seed: int = 0
    shuffle: bool = True
    lanes: int = field(default=1, init=False)

    def __post_init__(self) -> None:
        if not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"an order needs a size from 1 to 2^60, got {self.size}")

    def fingerprint(self) -> str:
        """A string that changes if any position holds another example."""
        return f"examples:{self.size}:{self.seed}:{self.shuffle}"

    def indices(self, positions: np.ndarray) -> np.ndarray:
        """The examples, int64 [n] in [0, size), at `positions`, int64 [n], of any epochs.

        Every aligned run of `size` positions holds each example once.
        """
        epochs, places = _epochs_and_places(positions, self.size)
        if not self.shuffle:
            return places
        keys = _fold(_root_key(self.seed, _SHUFFLE), epochs.astype(np.uint64))
        return _permute(places, self.size, keys)


@dataclass(frozen=True, eq=False)
class BlockOrder:
    """The order of an endless stream over examples that lie in blocks, for files read in sequence.

    In every epoch the blocks are permuted and laid end to end, and that row of examples is cut into
    `lanes` parts of equal length (to one). Position n of the epoch takes the next example of lane n
    % lanes. Within a lane, the examples of each `window` consecutive places are permuted. So each
    batch draws from all lanes, each lane from few blocks at a time, and whoever reads some lanes
    needs the blocks of no other. An epoch's blocks are permuted at its first use.

    Attributes:
      block_sizes: examples of each block, int64 [blocks], each at least 1, in the order in which
        the examples are numbered.
    """

    block_sizes: np.ndarray
    seed: int
    lanes: int
    window: int

    def __post_init__(self) -> None:
        sizes = np.asarray(self.block_sizes, np.int64)
        if not sizes.size or sizes.min() < 1 or not sizes.sum() <= _MAX_SIZE:
            raise ValueError("blocks hold at least one example each and at most 2^60 together")
        if self.lanes < 1 or self.window < 1:
            raise ValueError(f"lanes and window are at least 1: {self.lanes}, {self.window}")
        object.__setattr__(self, "block_sizes", sizes)
        object.__setattr__(self, "_firsts", np.cumsum(sizes) - sizes)
        # An epoch's end and the next one's beginning share a batch.
        object.__setattr__(self, "_epoch", lru_cache(maxsize=4)(self._permuted_blocks))

    @property
    def size(self) -> int:
        return int(self._firsts[-1] + self.block_sizes[-1])

    def fingerprint(self) -> str:
        sizes = hashlib.sha256(self.block_sizes.tobytes()).hexdigest()[:16]
        return f"blocks:{sizes}:{self.seed}:{self.lanes}:{self.window}"

    def indices(self, positions: np.ndarray) -> np.ndarray:
        epochs, places = _epochs_and_places(positions, self.size)
        result = np.empty_like(places)
        for epoch in np.unique(epochs):
            chosen = np.flatnonzero(epochs == epoch)
            result[chosen] = self._of_epoch(int(epoch), places[chosen])
        return result

    def _of_epoch(self, epoch: int, places: np.ndarray) -> np.ndarray:
        rows, lanes = np.divmod(places, self.lanes)
        length, longer = divmod(self.size, self.lanes)
        first = lanes * length + np.minimum(lanes, longer)
        windows, inside = np.divmod(rows, self.window)
        sizes = np.minimum(self.window, length + (lanes < longer) - windows * self.window)
        key = _fold(_root_key(self.seed, _SHUFFLE), np.uint64(epoch))
        keys = _fold(_fold(key, lanes.astype(np.uint64)), windows.astype(np.uint64))
        # Only the last window of a lane is shorter, so this loop runs at most three times.
        for size in np.unique(sizes):
            of_size = np.flatnonzero(sizes == size)
            inside[of_size] = _permute(inside[of_size], int(size), keys[of_size])
        # The place in the row of all examples, and then the block that it falls into.
        row = first + windows * self.window + inside
        blocks, starts = self._epoch(epoch)
        block = np.searchsorted(starts, row, side="right") - 1
        return self._firsts[blocks[block]] + row - starts[block]

    def _permuted_blocks(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The blocks in the order of an epoch, and the place at which each begins."""
        count = len(self.block_sizes)
        key = _fold(_root_key(self.seed, _BLOCKS), np.uint64(epoch))
        blocks = _permute(np.arange(count), count, np.repeat(key, count))
        sizes = self.block_sizes[blocks]
        return blocks, np.cumsum(sizes) - sizes


ExampleOrder = Order | BlockOrder

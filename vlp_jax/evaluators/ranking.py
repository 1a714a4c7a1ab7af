"""Ranks the right targets of queries among all targets, in both directions, block by block.

Memory never holds queries x targets. Each block of similarities is one matrix product, of which
only counts remain, for its rows and for its columns.

Equal inputs must have exactly equal similarities, or ties would be broken at random by rounding. A
matrix product does not promise that: the last bit depends on the position of a row in its block.
So two things are done:

- Equal rows are merged (a caption that occurs twice is computed once and counts twice).
- The similarities of pairs that belong together are computed separately in float64, rounded, and
  written into their blocks.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float, Int

BLOCK_ROWS = 255  # a column of a block is counted in 8 bits, see `_count_columns`
BLOCK_COLUMNS = 8192
_CHUNK = 4096  # rows that are hashed or multiplied at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Ranks:
    """The rank of each query's best own target.

    Attributes:
      above: int64 [queries], number of targets more similar than the best own target.
      equal: int64 [queries], number of targets exactly as similar, the best one included.
      own: int64 [queries], how many of `equal` are the query's own targets.
    """

    above: Int[np.ndarray, " queries"]
    equal: Int[np.ndarray, " queries"]
    own: Int[np.ndarray, " queries"]

    def found(self, k: int) -> Float[np.ndarray, " queries"]:
        """Computes the probability that an own target is among the first k; 0 or 1 without ties.

        Equally similar targets are in random order, so a collapsed model scores chance.
        """
        room = np.clip(k - self.above, 0, self.equal)
        # Draws without replacement: each own target must fall outside of the room that is left.
        missed = np.ones(len(room))
        for taken in range(int(self.own.max(initial=0))):
            left = np.maximum(self.equal - room - taken, 0) / np.maximum(self.equal - taken, 1)
            missed *= np.where(taken < self.own, left, 1)
        return 1 - missed

    def recall(self, k: int) -> float:
        """Computes R@k, in [0, 1]: the mean of `found`."""
        return float(self.found(k).mean())

    def ranks(self) -> Float[np.ndarray, " queries"]:
        """Computes the rank of the best own target, from 1; its expected value among ties."""
        return self.above + (self.equal + 1) / (self.own + 1)

    def median(self) -> float:
        """Computes the median of `ranks`."""
        return float(np.median(self.ranks()))

    def mean_reciprocal(self) -> float:
        """Computes the mean of 1 / rank, in (0, 1]; its expected value among ties."""
        triples = np.stack([self.above, self.equal, self.own], axis=1)
        single = self.equal == 1
        total = (1 / (self.above[single] + 1)).sum()
        different, counts = np.unique(triples[~single], axis=0, return_counts=True)
        for (above, equal, own), count in zip(different.tolist(), counts.tolist(), strict=True):
            total += count * _expected_reciprocal(above, equal, own)
        return float(total / len(triples))


def _expected_reciprocal(above: int, equal: int, own: int) -> float:
    """Computes E[1 / (above + T)], where T is the first of `own` places drawn from `equal`."""
    first = np.arange(1, equal - own + 2)
    # P(T = t + 1) = P(T = t) (equal - own - t + 1) / (equal - t)
    steps = (equal - own - first[:-1] + 1) / (equal - first[:-1])
    chance = own / equal * np.concatenate([[1.0], np.cumprod(steps)])
    return float((chance / (above + first)).sum())


@dataclasses.dataclass(frozen=True, eq=False)
class _Merged:
    """Rows without repetition, in the order of their first occurrence.

    Attributes:
      place: for each given row its number in `rows`.
      more: for each of `rows` the number of its repetitions.
      first: for each of `rows` the number of its first occurrence among the given rows.
      others: the numbers of the given rows that are repetitions.
    """

    rows: Float[np.ndarray, "different dim"]
    place: Int[np.ndarray, " given"]
    more: Int[np.ndarray, " different"]
    first: Int[np.ndarray, " different"]
    others: Int[np.ndarray, " repeated"]


def _hashes(rows: Float[np.ndarray, "n dim"]) -> np.ndarray:
    """Computes a 64-bit hash of the bits of each row."""
    # Odd weights, because a product with an odd number can be undone modulo 2^64: no bit is lost.
    weights = np.random.default_rng(0).integers(0, 2**64, rows.shape[1], np.uint64) | np.uint64(1)
    hashes = np.empty(len(rows), np.uint64)
    for start in range(0, len(rows), _CHUNK):
        # Adding 0 turns -0 into 0, which compares as equal but has other bits.
        bits = np.ascontiguousarray(rows[start : start + _CHUNK] + np.float32(0)).view(np.uint32)
        hashes[start : start + _CHUNK] = (bits * weights).sum(axis=1, dtype=np.uint64)
    return hashes


def _merge(rows: Float[np.ndarray, "n dim"]) -> _Merged:
    """Merges equal rows."""
    _, first, place = np.unique(_hashes(rows), return_index=True, return_inverse=True)
    repeated = np.flatnonzero(first[place] != np.arange(len(rows)))
    if not np.array_equal(rows[repeated], rows[first[place[repeated]]]):  # a collision of hashes
        _, first, place = np.unique(rows, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    number = np.empty_like(order)
    number[order] = np.arange(len(order))
    first, place = first[order], number[place]
    others = np.flatnonzero(first[place] != np.arange(len(rows)))
    different = rows if len(first) == len(rows) else rows[first]
    counts = np.bincount(place, minlength=len(first))
    return _Merged(np.ascontiguousarray(different), place, counts - 1, first, others)


@dataclasses.dataclass(frozen=True, eq=False)
class _Pairs:
    """The distinct pairs that belong together, sorted by row.

    Attributes:
      row, column: the numbers of the pair's merged image and merged text.
      place: for each given text the number of its pair.
    """

    row: Int[np.ndarray, " pairs"]
    column: Int[np.ndarray, " pairs"]
    similarity: Float[np.ndarray, " pairs"]
    place: Int[np.ndarray, " texts"]

    def put_into(self, block: np.ndarray, rows: slice, columns: slice) -> None:
        """Overwrites the similarities of these pairs in a block of the matrix product."""
        span = slice(*np.searchsorted(self.row, (rows.start, rows.stop)))
        row, column = self.row[span], self.column[span]
        inside = (columns.start <= column) & (column < columns.stop)
        at = row[inside] - rows.start, column[inside] - columns.start
        block[at] = self.similarity[span][inside]


def _pairs(image: _Merged, text: _Merged, owners: Int[np.ndarray, " texts"]) -> _Pairs:
    # One number for each pair, int64 because the product of two counts may exceed 32 bits.
    keys = image.place[owners].astype(np.int64) * len(text.rows) + text.place
    different, inverse = np.unique(keys, return_inverse=True)
    row, column = np.divmod(different, len(text.rows))
    values = np.empty(len(different), np.float32)
    for start in range(0, len(values), _CHUNK):
        part = slice(start, start + _CHUNK)
        products = image.rows[row[part]].astype(np.float64) * text.rows[column[part]]
        values[part] = products.sum(axis=1)
    return _Pairs(row, column, values, inverse)


class _Count:
    """Counts, over all blocks, the targets above and at the threshold of each query of one side."""

    def __init__(self, thresholds: np.ndarray, queries: _Merged, targets: _Merged) -> None:
        self.above = np.zeros(len(thresholds), np.int64)
        self.at_least = np.zeros(len(thresholds), np.int64)
        self._thresholds, self._queries = thresholds, queries
        # Merged targets that occur several times count several times.
        self._heavy = np.flatnonzero(targets.more)
        self._more = targets.more
        # Queries with equal rows have their own thresholds. They are few and compared one by one.
        self._others = queries.others[np.argsort(queries.place[queries.others], kind="stable")]
        self._others_at = queries.place[self._others]

    def add(self, block: np.ndarray, axis: int, queries: slice, targets: slice) -> None:
        """Adds a block of similarities; `axis` is the axis of the queries."""
        heavy = self._heavy[slice(*np.searchsorted(self._heavy, (targets.start, targets.stop)))]
        weights = self._more[heavy]
        self._compare(block, axis, self._queries.first[queries], heavy - targets.start, weights)
        span = slice(*np.searchsorted(self._others_at, (queries.start, queries.stop)))
        if span.start < span.stop:
            at = self._others_at[span] - queries.start
            rows = np.take(block, at, axis=axis)
            self._compare(rows, axis, self._others[span], heavy - targets.start, weights)

    def ranks(self, own: Int[np.ndarray, " queries"]) -> Ranks:
        """Returns the ranks; for `own` see `Ranks`."""
        return Ranks(self.above, self.at_least - self.above, own)

    def _compare(
        self, block: np.ndarray, axis: int, numbers: np.ndarray, heavy: np.ndarray, weights: Any
    ) -> None:
        thresholds = self._thresholds[numbers]
        thresholds = thresholds[:, None] if axis == 0 else thresholds[None]
        for total, compare in ((self.above, np.greater), (self.at_least, np.greater_equal)):
            mask = compare(block, thresholds)
            count = _count_rows(mask) if axis == 0 else _count_columns(mask)
            if heavy.size:
                again = np.take(mask, heavy, axis=1 - axis)
                count += again @ weights if axis == 0 else weights @ again
            total[numbers] += count


def _count_rows(mask: np.ndarray) -> Int[np.ndarray, " rows"]:
    """Counts True in each row. Counting packed bits is many times as fast as a sum."""
    return np.bitwise_count(np.packbits(mask, axis=1)).sum(axis=1, dtype=np.int64)


def _count_columns(mask: np.ndarray) -> Int[np.ndarray, " columns"]:
    """Counts True in each column. Sums of 255 rows fit in 8 bits, which is fast."""
    bits = mask.view(np.uint8)
    parts = [bits[i : i + 255].sum(axis=0, dtype=np.uint8) for i in range(0, len(bits), 255)]
    return np.sum(parts, axis=0, dtype=np.int64)


def _blocks(count: int, size: int) -> Iterator[slice]:
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def rank_both_ways(
    image: Float[np.ndarray, "images dim"],
    text: Float[np.ndarray, "texts dim"],
    owners: Int[np.ndarray, " texts"],
    block_rows: int = BLOCK_ROWS,
    block_columns: int = BLOCK_COLUMNS,
) -> tuple[Ranks, Ranks]:
    """Ranks each image's texts among all texts, and each text's image among all images.

    An image's own targets are all its texts; a text's own target is its image. An equal text of
    another image is not an own target: it ties.

    Args:
      image, text: unit vectors, float32.
      owners: for each text the number of its image. Every image has at least one text.

    Raises:
      ValueError: an image without a text, or an owner that is no image.
    """
    owned = np.bincount(owners, minlength=len(image))
    if len(owned) > len(image) or not owned.all():
        raise ValueError("owners must name every image at least once, and nothing else")
    image = np.asarray(image, np.float32)
    text = np.asarray(text, np.float32)
    images, texts = _merge(image), _merge(text)
    pairs = _pairs(images, texts, owners)
    own = pairs.similarity[pairs.place]
    best = np.full(len(image), -np.inf, np.float32)
    np.maximum.at(best, owners, own)
    best_count = np.bincount(owners[own == best[owners]], minlength=len(image))
    by_image, by_text = _Count(best, images, texts), _Count(own, texts, images)
    # One buffer for all blocks, of which the smaller ones at the edges take a part.
    memory = np.empty(block_rows * min(block_columns, len(texts.rows)), np.float32)
    for columns in _blocks(len(texts.rows), block_columns):
        for rows in _blocks(len(images.rows), block_rows):
            shape = rows.stop - rows.start, columns.stop - columns.start
            block = memory[: shape[0] * shape[1]].reshape(shape)
            np.matmul(images.rows[rows], texts.rows[columns].T, out=block)
            pairs.put_into(block, rows, columns)
            by_image.add(block, 0, rows, columns)
            by_text.add(block, 1, columns, rows)
    return by_image.ranks(best_count), by_text.ranks(np.ones(len(text), np.int64))

"""Finds exact nearest neighbours by cosine similarity, block by block, and lets them vote."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int

QUERY_BLOCK = 512
# Vectors of the bank in a block. Blocks double in size: after the first blocks hits are rare, and
# large blocks cost less per vector.
FIRST_BLOCK, LAST_BLOCK = 256, 8192


def nearest(
    queries: Float[np.ndarray, "n dim"], bank: Float[np.ndarray, "m dim"], k: int
) -> tuple[Float[np.ndarray, "n k"], Int[np.ndarray, "n k"]]:
    """Finds the `k` vectors of `bank` with the largest dot products, for each query.

    Returns their similarities (float32, the largest first) and their numbers. Of equal ones, those
    with the lowest numbers count. Memory grows neither with the queries nor with the bank. Raises
    ValueError if the bank has fewer than `k` vectors.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f"k={k} is not between 1 and the {len(bank)} rows of the index")
    similarity = np.empty((len(queries), k), np.float32)
    number = np.empty((len(queries), k), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        similarity[part], number[part] = _nearest(queries[part], bank, k)
    return similarity, number


def _nearest(queries: np.ndarray, bank: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    best = np.full((len(queries), k), -np.inf, np.float32)
    number = np.zeros((len(queries), k), np.int64)
    start, size = 0, FIRST_BLOCK
    while start < len(bank):
        block = queries @ np.asarray(bank[start : start + size], np.float32).T
        # Only what exceeds the k-th best so far can enter: an equal one has a higher number.
        hits = block > best[:, -1:]
        rows = np.flatnonzero(hits.any(axis=1))
        if rows.size:
            values, at = _hits(block[rows], hits[rows])
            merged = np.concatenate([best[rows], values], axis=1)
            numbers = np.concatenate([number[rows], at + start], axis=1)
            # Stable, and the best so far come first: of equal ones the lower number stays.
            order = np.argsort(-merged, axis=1, kind="stable")[:, :k]
            best[rows] = np.take_along_axis(merged, order, axis=1)
            number[rows] = np.take_along_axis(numbers, order, axis=1)
        start, size = start + size, min(2 * size, LAST_BLOCK)
    return best, number


def _hits(block: np.ndarray, hits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns values and columns where `hits` is True, row by row, padded with -inf."""
    counts = hits.sum(axis=1)
    row, column = np.nonzero(hits)
    # `np.nonzero` goes row by row. So the place of a hit in its row is its number minus the number
    # of hits in earlier rows.
    place = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    values = np.full((len(block), counts.max()), -np.inf, np.float32)
    columns = np.zeros(values.shape, np.int64)
    values[row, place], columns[row, place] = block[row, column], column
    return values, columns


def votes(
    similarity: Float[np.ndarray, "n k"],
    labels: Int[np.ndarray, "n k"],
    classes: int,
    temperature: float,
) -> Float[np.ndarray, "n classes"]:
    """Sums exp(similarity / temperature) of the neighbours of each class, float64.

    Each query's sums have a common factor, which changes no order (Wu et al. 2018, section 3.4).
    """
    weights = similarity.astype(np.float64)
    # Relative to the nearest neighbour, so that exp does not overflow at low temperatures.
    weights = np.exp((weights - weights[:, :1]) / temperature)
    # A bin for each pair of query and class: one `bincount` adds up the votes of all queries.
    keys = np.arange(len(labels))[:, None] * classes + labels
    total = np.bincount(keys.ravel(), weights=weights.ravel(), minlength=len(labels) * classes)
    return total.reshape(len(labels), classes)


def predictions(
    queries: Float[np.ndarray, "n dim"],
    bank: Float[np.ndarray, "m dim"],
    labels: Int[np.ndarray, " m"],
    ks: Sequence[int],
    temperature: float,
) -> Int[np.ndarray, "ks n"]:
    """Predicts the class with most votes of the k nearest vectors of `bank`, for each k.

    Of classes with equal votes the lowest number wins. Raises ValueError as `nearest`.
    """
    similarity, number = nearest(queries, bank, max(ks))
    classes = int(labels.max()) + 1
    result = np.empty((len(ks), len(queries)), np.int64)
    for start in range(0, len(queries), QUERY_BLOCK):
        part = slice(start, start + QUERY_BLOCK)
        for row, k in zip(result, ks, strict=True):
            near, near_labels = similarity[part, :k], labels[number[part, :k]]
            row[part] = votes(near, near_labels, classes, temperature).argmax(axis=1)
    return result

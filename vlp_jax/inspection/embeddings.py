"""Nearest neighbours among embeddings, and their projection to a plane."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.evaluators import neighbours

TSNE_MOST = 20_000  # points, for which t-SNE takes minutes


def nearest(
    queries: Float[np.ndarray, "queries dim"],
    index: Float[np.ndarray, "n dim"],
    k: int,
) -> tuple[Int[np.ndarray, "queries k"], Float[np.ndarray, "queries k"]]:
    """Finds the k rows of `index` with the largest inner product with each query, best first.

    The search is exact, block by block, so that memory does not grow with the index, which may be a
    `numpy.memmap`. Of equal products the smaller row number comes first. The products of unit
    vectors are cosines.

    Returns:
      row numbers, int64, and their products, float32.

    Raises:
      ValueError: k is not in [1, rows of the index], or the widths differ.
    """
    if queries.ndim != 2 or index.ndim != 2 or queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"queries {list(queries.shape)} and index {list(index.shape)} are not rows of one width"
        )
    best, rows = neighbours.nearest(np.asarray(queries, np.float32), index, k)
    return rows, best


def project(
    embeddings: Float[np.ndarray, "n dim"], method: str = "pca", seed: int = 0
) -> Float[np.ndarray, "n 2"]:
    """Projects embeddings onto a plane; the result is centred and float32.

    `method` is "pca" (the two directions of most variance, exact; each has the sign that makes its
    largest loading positive) or "tsne" (van der Maaten and Hinton 2008; scikit-learn's, by `seed`).

    Raises:
      UserError: the method is unknown, there are fewer than 3 embeddings, or t-SNE lacks
        scikit-learn or is given more than 20,000 points.
    """
    if method not in METHODS:
        raise UserError(unknown_key_message(method, METHODS, "the methods of projection"))
    if embeddings.ndim != 2 or len(embeddings) < 3:
        raise UserError(f"a projection needs at least 3 embeddings, not {list(embeddings.shape)}")
    return METHODS[method](np.asarray(embeddings, np.float64), seed).astype(np.float32)


def _pca(embeddings: np.ndarray, seed: int) -> np.ndarray:
    del seed
    centred = embeddings - embeddings.mean(axis=0)
    _, directions = np.linalg.eigh(centred.T @ centred)  # ascending
    plane = directions[:, :-3:-1]  # the last two, the larger one first
    if plane.shape[1] < 2:
        raise UserError("embeddings of one number have no plane to be projected on")
    largest = np.take_along_axis(plane, np.abs(plane).argmax(axis=0)[None], axis=0)
    return centred @ (plane * np.where(largest < 0, -1.0, 1.0))


def _tsne(embeddings: np.ndarray, seed: int) -> np.ndarray:
    try:
        from sklearn.manifold import TSNE
    except ImportError:
        raise UserError(
            "projection by t-SNE needs scikit-learn: pip install scikit-learn"
        ) from None
    if len(embeddings) > TSNE_MOST:
        raise UserError(f"t-SNE of {len(embeddings):,} points: give at most {TSNE_MOST:,}, or pca")
    # 30 is scikit-learn's default; a few points have fewer neighbours than that.
    perplexity = min(30.0, (len(embeddings) - 1) / 3)
    plane = TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(
        embeddings.astype(np.float32)
    )
    return plane - plane.mean(axis=0)


METHODS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {"pca": _pca, "tsne": _tsne}

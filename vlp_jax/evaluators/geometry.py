"""Measures the embedding space that images and texts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.splits import Split

BLOCK = 1024
UNIFORMITY_T = 2.0  # Wang and Isola 2020, section 4.1.2


def alignment(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "n dim"]) -> float:
    """Computes the mean of |x_i - y_i|^2 over pairs: 0 to 4 for unit vectors, lower is better.

    Source: Wang and Isola 2020, section 4.1.1, with alpha = 2.
    """
    total = 0.0
    for start in range(0, len(x), BLOCK):
        part = slice(start, start + BLOCK)
        total += float(((x[part].astype(np.float64) - y[part]) ** 2).sum())
    return total / len(x)


def uniformity(x: Float[np.ndarray, "n dim"]) -> float:
    """Computes log(mean(exp(-2 |x_i - x_j|^2))) over all pairs i < j.

    0 if all vectors are equal; lower if they are spread more evenly. NaN for fewer than two.

    Source: Wang and Isola 2020, section 4.1.2, with t = 2.
    """
    if len(x) < 2:
        return float("nan")
    squares = np.einsum("nd,nd->n", x, x, dtype=np.float64)
    total = 0.0
    for first in range(0, len(x), BLOCK):
        rows = slice(first, first + BLOCK)
        left = x[rows].astype(np.float64)
        for second in range(first, len(x), BLOCK):
            columns = slice(second, second + BLOCK)
            # |a - b|^2 = |a|^2 + |b|^2 - 2 ab, in place, so that one block needs one array.
            distances = left @ x[columns].T.astype(np.float64)
            distances *= -2
            distances += squares[rows, None]
            distances += squares[columns]
            # Rounding can make the distance of equal vectors negative.
            np.maximum(distances, 0, out=distances)
            distances *= -UNIFORMITY_T
            np.exp(distances, out=distances)
            # A block on the diagonal holds each pair twice, and each vector with itself.
            total += float(np.triu(distances, 1).sum() if first == second else distances.sum())
    return float(np.log(total / (len(x) * (len(x) - 1) / 2)))


def modality_gap(x: Float[np.ndarray, "n dim"], y: Float[np.ndarray, "m dim"]) -> float:
    """Computes the distance of the means of two sets of unit vectors, 0 to 2.

    Source: Liang et al. 2022, section 2.
    """
    return float(
        np.linalg.norm(x.mean(axis=0, dtype=np.float64) - y.mean(axis=0, dtype=np.float64))
    )


def effective_rank(x: Float[np.ndarray, "n dim"]) -> float:
    """Computes exp(entropy) of the singular values divided by their sum: 1 to min(n, dim).

    The mean of the vectors is not subtracted (Roy and Vetterli 2007, section 2).
    """
    triangle = np.zeros((0, x.shape[1]))
    # A QR decomposition x = QR keeps the singular values of x in R, which is small. It is computed
    # row block by row block, so that no float64 copy of x is needed.
    for start in range(0, len(x), 8 * BLOCK):
        part = x[start : start + 8 * BLOCK].astype(np.float64)
        triangle = np.linalg.qr(np.concatenate([triangle, part]), mode="r")
    values = np.linalg.svd(triangle, compute_uv=False)
    share = values / values.sum()
    share = share[share > 0]  # the limit of p log p for p -> 0 is 0
    return float(np.exp(-(share * np.log(share)).sum()))


@dataclasses.dataclass(frozen=True, eq=False)
class GeometryOutcome(Outcome):
    """Unit vectors of the pairs of a split, row by row, and each pair's position in its source."""

    image: Float[np.ndarray, "n dim"]
    text: Float[np.ndarray, "n dim"]
    index: Int[np.ndarray, " n"]

    saved = ("image", "text", "index")

    def scores(self) -> dict[str, float]:
        """Computes the measures of this module, and `pairs`, the number of pairs."""
        return {
            "alignment": alignment(self.image, self.text),
            "image_uniformity": uniformity(self.image),
            "text_uniformity": uniformity(self.text),
            "modality_gap": modality_gap(self.image, self.text),
            "image_effective_rank": effective_rank(self.image),
            "text_effective_rank": effective_rank(self.text),
            "pairs": float(len(self.image)),
        }


class Geometry(Evaluator):
    """Measures alignment, uniformity, modality gap and effective rank over the pairs of a split.

    Args:
      data: pairs, one text for each image.
    """

    needs = ("embed_image", "embed_text")
    reads_text = True

    def __init__(self, *, data: Mapping[str, Any], resources: Resources):
        self._split = Split(resources, data)

    def outcome(self, params: Any) -> GeometryOutcome:
        """Embeds the whole split."""
        embedded = self._split.embed(params, {"image": "embed_image", "text": "embed_text"})
        return GeometryOutcome(embedded.outputs["image"], embedded.outputs["text"], embedded.index)

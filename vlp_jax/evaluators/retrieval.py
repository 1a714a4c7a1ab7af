"""Image-text retrieval: for each image its text among all texts, and the other way round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlp_jax.evaluators.base import Pairs, Resources


def recall_at(
    similarity: Float[np.ndarray, "queries targets"], ks: Sequence[int]
) -> dict[int, float]:
    """Share of queries i whose target i is among the k most similar, for each k.

    Among targets that are exactly as similar (a caption that occurs twice) the order is random: a
    query counts with the probability that its target is among the first k. So a collapsed model
    scores chance, not one.
    """
    own = np.diagonal(similarity)[:, None]
    above = (similarity > own).sum(axis=1)
    equal = (similarity == own).sum(axis=1)
    return {k: float(np.clip((k - above) / equal, 0, 1).mean()) for k in ks}


class Retrieval:
    """R@k both ways over all image-text pairs of a split.

    Args:
      data: of the pairs, one text an image.
      ks: the k of R@k.
    """

    needs = ("embed_image", "embed_text")

    def __init__(
        self, *, data: Mapping[str, Any], resources: Resources, ks: Sequence[int] = (1, 5, 10)
    ):
        self._resources = resources
        self._ks = tuple(ks)
        self._pipeline = resources.pipeline(data)

    def similarity(self, params: Any) -> Float[np.ndarray, "images texts"]:
        """Cosine similarities, float32."""
        functions = {"image": "embed_image", "text": "embed_text"}
        embeddings, _ = self._resources.embed(params, self._pipeline.batches(), functions)
        return embeddings["image"] @ embeddings["text"].T

    def __call__(self, params: Any) -> Pairs:
        """`image_to_text_rK` and `text_to_image_rK` in [0, 1], `pairs` and `chance_r1`."""
        similarity = self.similarity(params)
        for k, value in recall_at(similarity, self._ks).items():
            yield f"image_to_text_r{k}", value
        for k, value in recall_at(similarity.T, self._ks).items():
            yield f"text_to_image_r{k}", value
        yield "pairs", float(len(similarity))
        yield "chance_r1", 1 / len(similarity)

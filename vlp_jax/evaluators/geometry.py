"""Evaluates the geometry of the embedding space that images and texts share."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from vlp_jax.evaluators import embedding_space
from vlp_jax.evaluators.base import Evaluator, Outcome, Resources
from vlp_jax.evaluators.splits import Split


@dataclasses.dataclass(frozen=True, eq=False)
class GeometryOutcome(Outcome):
    """Embeddings of the pairs of a split, in the order of the source.

    Attributes:
      image, text: unit vectors, float32 [n, dim]; row i of both is pair i.
      index: int64 [n], the position of each pair in its source (after `where` and `limit`).
    """

    image: Float[np.ndarray, "n dim"]
    text: Float[np.ndarray, "n dim"]
    index: Int[np.ndarray, " n"]

    def scores(self) -> dict[str, float]:
        """Computes the measures of `embedding_space`, and `pairs`, the number of pairs."""
        return {
            "alignment": embedding_space.alignment(self.image, self.text),
            "image_uniformity": embedding_space.uniformity(self.image),
            "text_uniformity": embedding_space.uniformity(self.text),
            "modality_gap": embedding_space.modality_gap(self.image, self.text),
            "image_effective_rank": embedding_space.effective_rank(self.image),
            "text_effective_rank": embedding_space.effective_rank(self.text),
            "pairs": float(len(self.image)),
        }

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the arrays for `save_embeddings`."""
        return {"image": self.image, "text": self.text, "index": self.index}


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

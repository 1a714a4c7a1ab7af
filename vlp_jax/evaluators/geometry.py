"""The geometry of the embedding space that images and texts share."""

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
    """The pairs of a split, in the order of the source.

    Attributes:
      image, text: unit vectors, float32 [n, dim]; those of a row belong together.
      index: int64 [n], the place of each pair in its source (after `where` and `limit`).
    """

    image: Float[np.ndarray, "n dim"]
    text: Float[np.ndarray, "n dim"]
    index: Int[np.ndarray, " n"]

    def scores(self) -> dict[str, float]:
        """`alignment` and `..._uniformity` (Wang and Isola 2020), `modality_gap` (Liang et al.
        2022), `..._effective_rank` (Roy and Vetterli 2007), `pairs`: see `embedding_space`."""
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
        """What `save_embeddings` writes."""
        return {"image": self.image, "text": self.text, "index": self.index}


class Geometry(Evaluator):
    """How images and texts lie in the space that they share, over all pairs of a split.

    Args:
      data: of the pairs, one text an image.
    """

    needs = ("embed_image", "embed_text")
    reads_text = True

    def __init__(self, *, data: Mapping[str, Any], resources: Resources):
        self._split = Split(resources, data)

    def outcome(self, params: Any) -> GeometryOutcome:
        """Embeddings of the whole split."""
        found = self._split.embed(params, {"image": "embed_image", "text": "embed_text"})
        return GeometryOutcome(found.outputs["image"], found.outputs["text"], found.index)

"""Evaluates the reconstructions of a masked autoencoder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from vlp_jax.evaluators.base import INDEX, SHOWN, Evaluator, Outcome, Resources
from vlp_jax.observe.samples import Sample

VIEWS = "reconstruct"  # the function that returns the three views of an image


@dataclasses.dataclass(frozen=True, eq=False)
class ReconstructionOutcome(Outcome):
    """The reconstruction error of every image in units of the loss, and its place in the source.

    `views` are three pictures of a few images, in [0, 1].
    """

    errors: Float[np.ndarray, " n"]
    index: np.ndarray
    views: Float[np.ndarray, "few 3 height width 3"] | None = None

    saved = ("errors", "index")

    def scores(self) -> dict[str, float]:
        """Computes `error`, the mean squared error over the hidden patches, and `examples`."""
        return {"error": float(self.errors.mean()), "examples": float(len(self.errors))}

    def samples(self) -> Sequence[Sample]:
        """Returns pictures of the three views of an image side by side."""
        if self.views is None:
            return ()
        pixels = np.round(255 * np.clip(self.views, 0, 1)).astype(np.uint8)
        return [Sample(np.concatenate(list(three), axis=1)) for three in pixels]


class Reconstruction(Evaluator):
    """Scores the mean squared error over the hidden patches of every image of a split.

    The masks are random, and the same at every step of a run.

    Args:
      data: the images.
    """

    needs = ("reconstruction_error",)

    def __init__(self, *, data: Mapping[str, Any], resources: Resources):
        self._resources = resources
        self._pipeline = resources.pipeline(data)

    def outcome(self, params: Any) -> ReconstructionOutcome:
        """Computes the errors of the whole split, and views of its first images."""
        errors, fields = self._resources.embed(
            params, self._pipeline.batches(), {"image": "reconstruction_error"}
        )
        views = None
        if VIEWS in self._resources.functions:
            # One batch: three pictures of each image would be too much for a whole split.
            first = next(self._pipeline.batches())
            pictures, _ = self._resources.embed(params, iter([first]), {"image": VIEWS})
            views = pictures["image"][:SHOWN]
        return ReconstructionOutcome(errors["image"], fields[INDEX], views)

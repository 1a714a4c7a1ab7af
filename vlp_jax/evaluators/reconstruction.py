"""How well a masked autoencoder paints what it does not see."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vlp_jax.evaluators.base import Pairs, Resources


class Reconstruction:
    """Mean squared error over the hidden patches of every image of a split.

    The masks are random and the same at every step of a run.

    Args:
      data: of the images.
    """

    needs = ("reconstruction_error",)

    def __init__(self, *, data: Mapping[str, Any], resources: Resources):
        self._resources = resources
        self._pipeline = resources.pipeline(data)

    def __call__(self, params: Any) -> Pairs:
        """`error`, in the units of the loss, and `examples`."""
        errors, _ = self._resources.embed(
            params, self._pipeline.batches(), {"image": "reconstruction_error"}
        )
        yield "error", float(errors["image"].mean())
        yield "examples", float(len(errors["image"]))

"""What the loop, the evaluators and export know of a task."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import flax.linen as nn
import jax
from jaxtyping import Array, Float, PRNGKeyArray

Params = Any
Batch = Mapping[str, Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]  # of the global batch
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); merged by adding both


class Objective(Protocol):
    """A frozen dataclass of Flax modules and numbers.

    Attributes:
      model: the Flax module, or the first of several.
      couples_batch: the loss of an example depends on the others, so that it needs the whole global
        batch (contrastive), and gradients of parts of it do not add up.
      compute_dtype: of the matrix products, for the peak that MFU is measured against.
    """

    model: nn.Module
    couples_batch: bool
    compute_dtype: Any

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Fresh parameters, in `nn.LogicallyPartitioned` boxes. Can be jitted."""

    def loss(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, train: bool
    ) -> tuple[Float[Array, ""], Metrics]:
        """The scalar to minimize, and what else is worth knowing."""

    def functions(self) -> dict[str, Callable[..., Array]]:
        """What evaluators and export may ask for, each `f(params, array) -> array`, or of a dict of
        arrays where a model takes several."""

    def flops_per_example(self, batch_spec: BatchSpec) -> float:
        """Analytic FLOPs of the forward pass on one example; a multiply-add counts 2."""

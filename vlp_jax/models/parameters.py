"""Parameters with the logical names of their dimensions (`vlp_jax.models.layers` lists them)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
from jaxtyping import Array

Dtype = Any


class Named(nn.LogicallyPartitioned):
    """A parameter with the logical names of its dimensions.

    Unboxing adds no sharding constraint: `nn.DenseGeneral` unboxes a kernel while it is still flat,
    where the names do not fit, and the step is given its parameters already laid out.
    """

    def unbox(self, apply_constraint: bool = False) -> Any:
        """The bare parameter."""
        return self.value


def named(init: Callable[..., Array], *names: str | None) -> Callable[..., Named]:
    """An initializer whose parameter carries the logical axis `names`."""

    @functools.wraps(init)
    def initialize(*args: Any, **kwargs: Any) -> Named:
        return Named(init(*args, **kwargs), names)

    return initialize


def layer_norm(eps: float, dtype: Dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last dimension with float32 statistics and parameters."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        name=name,
        use_fast_variance=False,
        scale_init=named(nn.initializers.ones_init(), "norm"),
        bias_init=named(nn.initializers.zeros_init(), "norm"),
    )

"""Parameters with the logical names of their dimensions (`vlp_jax.models.layers` lists them)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

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


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (Ba et al. 2016), with float32 statistics and parameters.

    Mean and variance have names (`remat.STATISTICS`), so that a backward pass that computes the
    result again need not add up every token a second time.
    """

    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), width, jnp.float32)
        bias = self.param("bias", named(nn.initializers.zeros_init(), "norm"), width, jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = checkpoint_name(x.mean(axis=-1, keepdims=True), "norm_mean")
        centered = x - mean
        variance = checkpoint_name(
            jnp.square(centered).mean(axis=-1, keepdims=True), "norm_variance"
        )
        return (centered * (jax.lax.rsqrt(variance + self.eps) * scale) + bias).astype(self.dtype)


def layer_norm(eps: float, dtype: Dtype, name: str) -> LayerNorm:
    """A `LayerNorm` of that name, inside of a module."""
    return LayerNorm(eps, dtype, name=name)

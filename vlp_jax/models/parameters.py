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

from vlp_jax.models.values import TransformerConfig

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
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), width, jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = checkpoint_name(x.mean(axis=-1, keepdims=True), "norm_mean")
        centered = x - mean
        variance = checkpoint_name(
            jnp.square(centered).mean(axis=-1, keepdims=True), "norm_variance"
        )
        x = centered * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.use_bias:
            zeros = named(nn.initializers.zeros_init(), "norm")
            x = x + self.param("bias", zeros, width, jnp.float32)
        return x.astype(self.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a learned scale (Zhang and Sennrich 2019, "Root Mean Square
    Layer Normalization"), over the last dimension, in float32."""

    eps: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        ones = named(nn.initializers.ones_init(), "norm")
        scale = self.param("scale", ones, (x.shape[-1],), jnp.float32)
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        square = checkpoint_name(jnp.square(x).mean(axis=-1, keepdims=True), "norm_variance")
        return (x * (jax.lax.rsqrt(square + self.eps) * scale)).astype(self.dtype)


def norm(config: TransformerConfig, dtype: Dtype, name: str | None) -> LayerNorm | RMSNorm:
    """The norm of a Transformer's layers, under that name, inside of a module.

    Args:
      name: None in a `setup`, where the attribute names it.
    """
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, dtype, name=name)
    return LayerNorm(config.norm_eps, dtype, config.bias, name=name)

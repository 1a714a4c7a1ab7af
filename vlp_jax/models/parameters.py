"""Parameters with logical axis names (listed in `vlp_jax.models.layers`), and the norms."""

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

    Unboxing adds no sharding constraint. `nn.DenseGeneral` unboxes a kernel while it is still flat,
    where the names do not fit. And the training step gets its parameters sharded already.
    """

    def unbox(self, apply_constraint: bool = False) -> Any:
        """Returns the bare parameter."""
        return self.value


def named(init: Callable[..., Array], *names: str | None) -> Callable[..., Named]:
    """Wraps an initializer so that its parameter carries the logical axis `names`."""

    @functools.wraps(init)
    def initialize(*args: Any, **kwargs: Any) -> Named:
        return Named(init(*args, **kwargs), names)

    return initialize


class LayerNorm(nn.Module):
    """LayerNorm over the last dimension (Ba et al. 2016), with float32 statistics and parameters.

    Mean and variance have names (`remat.STATISTICS`). A remat policy keeps them, so that the
    backward pass can repeat the norm without reading every token for its statistics.
    """

    eps: float
    dtype: Dtype
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), width, jnp.float32)
        # At least float32: bfloat16 has 8 bits, too few for a mean of squares.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        mean = checkpoint_name(x.mean(axis=-1, keepdims=True), "norm_mean")
        centered = x - mean
        variance = checkpoint_name(
            jnp.square(centered).mean(axis=-1, keepdims=True), "norm_variance"
        )
        # Scale times rsqrt first: one multiplication per number of x, and not two.
        x = centered * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.use_bias:
            zeros = named(nn.initializers.zeros_init(), "norm")
            x = x + self.param("bias", zeros, width, jnp.float32)
        return x.astype(self.dtype)


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) times a learned scale, in float32.

    Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
    """

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
    """Makes the norm that a Transformer's layers use. Call it within a module.

    Args:
      name: name of the submodule; None in a `setup` method, where the attribute names it.
    """
    if config.norm == "rms":
        return RMSNorm(config.norm_eps, dtype, name=name)
    return LayerNorm(config.norm_eps, dtype, config.bias, name=name)

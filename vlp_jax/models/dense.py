"""Parameters with logical axis names, norms, and linear layers, also in 8 bits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vlp_jax.models.values import ComputeConfig, TransformerConfig, check_choice

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


class Norm(nn.Module):
    """LayerNorm (Ba et al. 2016) or RMSNorm, with float32 statistics and parameters.

    RMSNorm (Zhang and Sennrich 2019) subtracts no mean: x / sqrt(mean(x^2) + eps) times a scale.
    Mean and variance have names (`layers.STATISTICS`). A remat policy keeps them, so that the
    backward pass can repeat the norm without reading every token for its statistics.

    Attributes:
      centered: True for LayerNorm, False for RMSNorm.
    """

    eps: float
    dtype: Dtype
    use_bias: bool = True
    centered: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = (x.shape[-1],)
        scale = self.param("scale", named(nn.initializers.ones_init(), "norm"), width, jnp.float32)
        # At least float32: bfloat16 has 8 bits, too few for a mean of squares.
        x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.centered:
            x = x - checkpoint_name(x.mean(axis=-1, keepdims=True), "norm_mean")
        variance = checkpoint_name(jnp.square(x).mean(axis=-1, keepdims=True), "norm_variance")
        # Scale times rsqrt first: one multiplication per number of x, and not two.
        x = x * (jax.lax.rsqrt(variance + self.eps) * scale)
        if self.use_bias:
            zeros = named(nn.initializers.zeros_init(), "norm")
            x = x + self.param("bias", zeros, width, jnp.float32)
        return x.astype(self.dtype)


def norm(config: TransformerConfig, dtype: Dtype, name: str | None) -> Norm:
    """Makes the norm of a Transformer's layers, within a module; `name` is None in `setup`."""
    layer = config.norm == "layer"
    return Norm(config.norm_eps, dtype, config.bias and layer, layer, name=name)


# Products in 8 bits, for chips whose 8-bit units are twice as fast. Only products with a layer's
# kernel use 8 bits, in the forward and in the backward pass. Parameters, activations between
# layers, attention and the optimizer keep their dtypes. Each array is divided by one scale that is
# computed just before ("current scaling"; Micikevicius et al. 2022, "FP8 Formats for Deep
# Learning", 3). So scales are no state, and checkpoints do not depend on the quantization.
QUANTIZATIONS = ("none", "fp8")
# Micikevicius et al. 2022, 3: E4M3 for activations and weights, E5M2 for gradients.
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

_WIDTH = (((1,), (0,)), ((), ()))  # a @ b
_OUTPUTS = (((1,), (1,)), ((), ()))  # a @ b.T
_ROWS = (((0,), (0,)), ((), ()))  # a.T @ b


def multiply(
    x: Float[Array, "*batch n"], kernel: Float[Array, "n ..."], quantization: str
) -> Float[Array, "*batch ..."]:
    """Computes `x @ kernel`, with "fp8" in 8 bits and float32 sums; ValueError for other names."""
    check_choice("quantization", quantization, QUANTIZATIONS)
    if quantization == "none":
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
    flat = _matmul(x.reshape(-1, x.shape[-1]), kernel.reshape(len(kernel), -1))
    out = flat.astype(jnp.result_type(x, kernel))
    return out.reshape(*x.shape[:-1], *kernel.shape[1:])


def quantize(x: Float[Array, "*dims"], dtype: Any) -> tuple[Array, Float[Array, ""]]:
    """Scales `x` so that its largest absolute value becomes the dtype's; returns it and the scale.

    The scale of an array of zeros is 1. Values that are not finite stay so.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
    # A smaller scale would be a denormal, which devices flush to zero; then x / 0 follows.
    least = float(jnp.finfo(jnp.float32).tiny)
    factor = jnp.maximum(largest / float(jnp.finfo(dtype).max), least)
    factor = jnp.where(largest == 0, 1.0, factor)
    return (x.astype(jnp.float32) / factor).astype(dtype), factor


def _scaled_product(a: tuple[Array, Array], b: tuple[Array, Array], dims: Any) -> Array:
    out = jax.lax.dot_general(a[0], b[0], dims, preferred_element_type=jnp.float32)
    return out * (a[1] * b[1])


@jax.custom_vjp
def _matmul(lhs: Float[Array, "m k"], rhs: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return _matmul_forward(lhs, rhs)[0]


def _matmul_forward(lhs: Array, rhs: Array) -> tuple[Array, Any]:
    a, b = quantize(lhs, FORWARD), quantize(rhs, FORWARD)
    # A residual must be an array, so empty arrays carry the dtypes of the gradients.
    types = (jnp.zeros(0, lhs.dtype), jnp.zeros(0, rhs.dtype))
    return _scaled_product(a, b, _WIDTH), (a, b, types)


def _matmul_backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, types = residuals
    g = quantize(gradient, BACKWARD)
    to_lhs, to_rhs = _scaled_product(g, b, _OUTPUTS), _scaled_product(a, g, _ROWS)
    return to_lhs.astype(types[0].dtype), to_rhs.astype(types[1].dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


@jax.custom_vjp
def add_bias(x: Float[Array, "batch tokens *dims"], bias: Float[Array, "*dims"]) -> Array:
    """Computes `x + bias`, with a gradient of the bias that is fast on a TPU.

    In bfloat16 that gradient is a product with ones, accumulated in float32. The TPU's matrix units
    then add up the tokens, in a thirtieth of the cycles of a sum (estimate of its compiler). In
    float32 it is a plain sum: on a CPU the product would make the whole step a fifth slower.
    """
    return x + bias


def _forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return x + bias, jnp.zeros((), bias.dtype)  # a residual that carries the dtype alone


def _backward(like: ArrayLike, gradient: Array) -> tuple[Array, Array]:
    if gradient.dtype != jnp.bfloat16:
        return gradient, gradient.sum(axis=(0, 1)).astype(like.dtype)
    # Without the barrier the compiler knows that these are ones, and turns the product into a sum.
    ones = jax.lax.optimization_barrier(jnp.ones(gradient.shape[:2], gradient.dtype))
    total = jnp.einsum("bt,bt...->...", ones, gradient, preferred_element_type=jnp.float32)
    return gradient, total.astype(like.dtype)


add_bias.defvjp(_forward, _backward)


# Not Flax's own layers, though with their parameters and numbers: a TPU adds up the gradient of a
# bias on its matrix units (`add_bias`), and products may be in 8 bits.
class Product(nn.Module):
    """Base of linear layers whose kernel may have several input or output dimensions.

    Parameters have the shapes and initial values of `nn.DenseGeneral`.

    Attributes:
      kernel_names, bias_names: logical names of the dimensions.
      compute: only `dtype` and `quantization` are used.
      kernel_init: initializer of the kernel, called with its shape as a matrix [n, m].
      bias_init: initializer of the bias.
      use_bias: whether there is a bias.
    """

    kernel_names: tuple[str | None, ...]
    bias_names: tuple[str | None, ...]
    compute: ComputeConfig
    kernel_init: Callable[..., Array] = nn.initializers.xavier_uniform()
    bias_init: Callable[..., Array] = nn.initializers.zeros_init()
    use_bias: bool = True

    def product(
        self,
        x: Float[Array, "*batch n"],
        kernel_shape: tuple[int, ...],
        bias_shape: tuple[int, ...],
        *,
        flat: bool = True,
    ) -> Float[Array, "*batch m"] | Float[Array, "*batch heads head_dim"]:
        """Computes x @ kernel + bias, with the kernel reshaped to a matrix [n, m].

        Args:
          kernel_shape, bias_shape: shapes of the parameters; `bias_shape` has the product m.
          flat: True returns [.., m]; False returns [.., *bias_shape].
        """
        width = math.prod(bias_shape)

        def initialize(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            # Drawn as a matrix, because an initializer would take extra dimensions for a receptive
            # field.
            return self.kernel_init(key, (x.shape[-1], width), dtype).reshape(shape)

        names = named(initialize, *self.kernel_names)
        kernel = self.param("kernel", names, kernel_shape, jnp.float32)
        x, kernel = x.astype(self.compute.dtype), kernel.astype(self.compute.dtype)
        outputs = (width,) if flat else bias_shape
        x = multiply(x, kernel.reshape(x.shape[-1], *outputs), self.compute.quantization)
        if not self.use_bias:
            return x
        bias = self.param("bias", named(self.bias_init, *self.bias_names), bias_shape, jnp.float32)
        bias = bias.astype(self.compute.dtype).reshape(outputs)
        # `add_bias` sums over batch and tokens, so it needs exactly these two dimensions.
        return add_bias(x, bias) if x.ndim - len(outputs) == 2 else x + bias


class Dense(Product):
    """A linear layer over the last dimension, to `features` outputs."""

    features: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch features"]:
        return self.product(x, (x.shape[-1], self.features), (self.features,))

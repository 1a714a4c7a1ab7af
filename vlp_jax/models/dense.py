"""Linear layers: a product with a kernel, and a bias, with names for sharding."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vlp_jax.models.parameters import Dtype, named
from vlp_jax.models.quantization import dot_general_of
from vlp_jax.models.values import ComputeConfig


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
# bias on its matrix units (`add_bias`), and the backward pass needs names inside (`models.remat`).
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
        multiply = dot_general_of(self.compute.quantization) or jax.lax.dot_general
        kernel = kernel.reshape(x.shape[-1], *outputs)
        x = multiply(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
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

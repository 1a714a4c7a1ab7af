"""Products with a kernel, and biases, as layers need them."""

from __future__ import annotations

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models.parameters import Dtype, named
from vlp_jax.models.quantization import dot_general_of
from vlp_jax.models.values import ComputeConfig


@jax.custom_vjp
def add_bias(x: Float[Array, "batch tokens *dims"], bias: Float[Array, "*dims"]) -> Array:
    """`x + bias`. In bfloat16 the gradient of the bias is a product with ones, and its sum float32.

    So the matrix units of a TPU add up the tokens, by its compiler's word in a thirtieth of the
    cycles that a sum takes. In float32 it is a sum: a CPU takes a fifth less for the whole step.
    """
    return x + bias


def _forward(x: Array, bias: Array) -> tuple[Array, Array]:
    return x + bias, jnp.zeros((), bias.dtype)


def _backward(like: Array, gradient: Array) -> tuple[Array, Array]:
    if gradient.dtype != jnp.bfloat16:
        return gradient, gradient.sum(axis=(0, 1)).astype(like.dtype)
    # Behind the barrier the compiler does not see that these are ones, and makes no sum of it.
    ones = jax.lax.optimization_barrier(jnp.ones(gradient.shape[:2], gradient.dtype))
    total = jnp.einsum("bt,bt...->...", ones, gradient, preferred_element_type=jnp.float32)
    return gradient, total.astype(like.dtype)


add_bias.defvjp(_forward, _backward)


# Not Flax's own layers, though with their parameters and numbers: a TPU adds up the gradient of a
# bias on its matrix units (`add_bias`), and the backward pass needs names inside (`models.remat`).
class Product(nn.Module):
    """A product whose kernel may have several dimensions on either side, and a bias.

    Parameters have the shapes and initial values of `nn.DenseGeneral`.

    Attributes:
      kernel_names, bias_names: logical names of the dimensions.
      compute: its `dtype` and `quantization`.
      kernel_init: of the kernel as a matrix, [n, m].
      bias_init: of the bias.
      use_bias: whether there is one.
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
        """x @ kernel + bias, the kernel being [n, m] once it is flat.

        Args:
          flat: the result is [.., m]; otherwise it has the dimensions of the bias in its place.
        """
        width = math.prod(bias_shape)

        def initialize(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
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
        return add_bias(x, bias) if x.ndim - len(outputs) == 2 else x + bias


class Dense(Product):
    """`x @ kernel + bias` over the last dimension."""

    features: int = 1

    @nn.compact
    def __call__(self, x: Float[Array, "*batch n"]) -> Float[Array, "*batch features"]:
        return self.product(x, (x.shape[-1], self.features), (self.features,))

"""Computes the matrix products of layers in 8 bits, for chips whose 8-bit units are twice as fast.

Only products with a layer's kernel use 8 bits, in the forward and in the backward pass. Parameters,
activations between layers, attention and the optimizer keep their dtypes. Each array is divided by
one scale, computed from the array just before the product ("current scaling"; Micikevicius et al.
2022, "FP8 Formats for Deep Learning", section 3). So scales are no state, and checkpoints do not
depend on the quantization.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models.variants import check_choice

QUANTIZATIONS = ("none", "fp8")
# Micikevicius et al. 2022, 3: E4M3 for activations and weights, E5M2 for gradients.
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

_WIDTH = (((1,), (0,)), ((), ()))  # a @ b
_OUTPUTS = (((1,), (1,)), ((), ()))  # a @ b.T
_ROWS = (((0,), (0,)), ((), ()))  # a.T @ b


def dot_general_of(quantization: str) -> Callable[..., Array] | None:
    """Returns the `dot_general` of a quantization; None for `jax.lax.dot_general`.

    Raises:
      ValueError: an unknown name.
    """
    check_choice("quantization", quantization, QUANTIZATIONS)
    return fp8_dot_general if quantization == "fp8" else None


def fp8_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """Computes `jax.lax.dot_general` of activations and a kernel in 8 bits, with float32 sums.

    Raises:
      ValueError: the contraction is not between the last dimensions of `lhs` and the first of
        `rhs`, or there are batch dimensions.
    """
    del precision  # 8-bit products have only one
    (left, right), batch = dimension_numbers
    count = len(left)
    last, first = tuple(range(lhs.ndim - count, lhs.ndim)), tuple(range(count))
    if tuple(left) != last or tuple(right) != first or any(batch):
        raise ValueError(f"quantization 'fp8' has no products with dimensions {dimension_numbers}")
    rows, columns = lhs.shape[: lhs.ndim - count], rhs.shape[count:]
    size = math.prod(rhs.shape[:count])
    flat = _matmul(lhs.reshape(-1, size), rhs.reshape(size, -1))
    out = flat.astype(preferred_element_type or jnp.result_type(lhs, rhs))
    return out.reshape(*rows, *columns)


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


def _product(a: tuple[Array, Array], b: tuple[Array, Array], dims: Any) -> Array:
    out = jax.lax.dot_general(a[0], b[0], dims, preferred_element_type=jnp.float32)
    return out * (a[1] * b[1])


@jax.custom_vjp
def _matmul(lhs: Float[Array, "m k"], rhs: Float[Array, "k n"]) -> Float[Array, "m n"]:
    return _forward(lhs, rhs)[0]


def _forward(lhs: Array, rhs: Array) -> tuple[Array, Any]:
    a, b = quantize(lhs, FORWARD), quantize(rhs, FORWARD)
    # A residual must be an array, so empty arrays carry the dtypes of the gradients.
    types = (jnp.zeros(0, lhs.dtype), jnp.zeros(0, rhs.dtype))
    return _product(a, b, _WIDTH), (a, b, types)


def _backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, types = residuals
    g = quantize(gradient, BACKWARD)
    to_lhs, to_rhs = _product(g, b, _OUTPUTS), _product(a, g, _ROWS)
    return to_lhs.astype(types[0].dtype), to_rhs.astype(types[1].dtype)


_matmul.defvjp(_forward, _backward)

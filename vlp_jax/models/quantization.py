"""Matrix products of layers in 8 bits, for chips whose 8-bit units are twice as fast.

Parameters, activations between layers, attention and the optimizer stay as they are: what is cast
is the factors of the products with a layer's kernel, forward and backward, each whole array by one
factor that is taken from the array itself at that moment ("current scaling"; Micikevicius et al.
2022, "FP8 Formats for Deep Learning", section 3). So there is no state, and a checkpoint does not
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

QUANTIZATIONS = ("none", "fp8")
# Micikevicius et al. 2022, 3: E4M3 for activations and weights, E5M2 for gradients.
FORWARD, BACKWARD = jnp.float8_e4m3fn, jnp.float8_e5m2

_WIDTH = (((1,), (0,)), ((), ()))  # a @ b
_OUTPUTS = (((1,), (1,)), ((), ()))  # a @ b.T
_ROWS = (((0,), (0,)), ((), ()))  # a.T @ b


def dot_general_of(quantization: str) -> Callable[..., Array] | None:
    """What `flax.linen.Dense` takes as `dot_general`; None for its own.

    Raises:
      ValueError: an unknown name.
    """
    if quantization not in QUANTIZATIONS:
        known = ", ".join(QUANTIZATIONS)
        raise ValueError(f"unknown quantization {quantization!r} (known: {known})")
    return fp8_dot_general if quantization == "fp8" else None


def fp8_dot_general(
    lhs: Array,
    rhs: Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> Array:
    """`jax.lax.dot_general` of activations and a kernel, in 8 bits; sums are float32.

    Raises:
      ValueError: the last dimensions of `lhs` are not contracted with the first of `rhs`, or there
        are batch dimensions.
    """
    del precision  # there is one
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
    """`x` divided by a factor so that its largest absolute value is the dtype's, and that factor.

    An array of zeros has the factor 1. Values that are not finite stay so. The factor of the least
    numbers is the least one that is not flushed to zero, by which nothing could be divided.
    """
    largest = jnp.abs(x).max().astype(jnp.float32)
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
    # Empty arrays that say in what types the gradients leave.
    types = (jnp.zeros(0, lhs.dtype), jnp.zeros(0, rhs.dtype))
    return _product(a, b, _WIDTH), (a, b, types)


def _backward(residuals: Any, gradient: Array) -> tuple[Array, Array]:
    a, b, types = residuals
    g = quantize(gradient, BACKWARD)
    to_lhs, to_rhs = _product(g, b, _OUTPUTS), _product(a, g, _ROWS)
    return to_lhs.astype(types[0].dtype), to_rhs.astype(types[1].dtype)


_matmul.defvjp(_forward, _backward)

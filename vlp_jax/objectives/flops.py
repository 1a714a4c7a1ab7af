"""Counts the FLOPs of a function in its jaxpr: matrix products and convolutions.

A multiply-add is 2 FLOPs. Every round of a scan counts; XLA's `cost_analysis()` counts the body of
a loop once. Work that a rematerialization policy repeats counts again. Inside `shard_map` shapes
are per device, so its FLOPs are multiplied by the number of devices.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.lax import Precision

# A TPU's matrix unit computes a float32 product as this many bfloat16 products, by precision
# (jax.lax.Precision; openxla/xla, xla_data.proto, PrecisionConfig).
_PASSES = {Precision.DEFAULT: 1, Precision.HIGH: 3, Precision.HIGHEST: 6}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of all devices together.

    Attributes:
      total: the count; a multiply-add is 2 at any precision.
      passes: `total` in bfloat16 products of a matrix unit: a float32 product of highest precision
        counts six times.
      uncounted: operations whose FLOPs are missing in `total`, in words.
    """

    total: float = 0.0
    passes: float = 0.0
    uncounted: tuple[str, ...] = ()

    def __add__(self, other: Flops) -> Flops:
        names = dict.fromkeys((*self.uncounted, *other.uncounted))
        return Flops(self.total + other.total, self.passes + other.passes, tuple(names))

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.total * factor, self.passes * factor, self.uncounted)


def count_flops(function: Any, *arguments: Any) -> Flops:
    """Counts one call of `function` on arrays or their specs; it is traced and not run."""
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> Flops:
    """Counts one run of `jaxpr`. A conditional counts as its most expensive branch."""
    total = Flops()
    for equation in jaxpr.eqns:
        total += _equation(equation)
    return total


def _equation(equation: core.JaxprEqn) -> Flops:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        return _product(_dot_flops(equation), equation)
    if name == "conv_general_dilated":
        return _product(_convolution_flops(equation), equation)
    inner = [jaxpr_flops(jaxpr) for jaxpr in _jaxprs(params)]
    if name == "cond":
        return max(inner, key=lambda flops: flops.total)
    if name == "while":
        body = jaxpr_flops(params["body_jaxpr"].jaxpr)
        # A loop without products has nothing to count, however often it runs.
        if not body.total:
            return body
        return body + Flops(uncounted=("a while loop whose rounds depend on data, counted once",))
    whole = sum(inner, Flops())
    if name == "scan":
        return whole * params["length"]
    if name == "shard_map":
        return whole * math.prod(params["mesh"].shape[axis] for axis in _manual_axes(params))
    if name == "pallas_call":
        return whole * math.prod(params["grid_mapping"].grid)
    if not inner and ("custom_call" in name or "ffi" in name or "attention" in name):
        return Flops(uncounted=(f"the kernel {name}",))
    return whole


def _jaxprs(params: dict[str, Any]) -> Iterator[core.Jaxpr]:
    """Yields the jaxprs among the parameters of an equation, such as the body of a scan."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """Returns the mesh axes that a `shard_map` splits; versions of JAX name them differently."""
    return params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]


def _dot_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Counts each tap of the kernel for each output, without the zeros of a dilated input."""
    params = equation.params
    kernel = equation.invars[1].aval.shape
    spec = params["dimension_numbers"].rhs_spec  # (out features, in features, *spatial)
    taps = math.prod(kernel[i] for i in spec[1:])
    zeros = math.prod(params["lhs_dilation"])
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / zeros


def _product(flops: float, equation: core.JaxprEqn) -> Flops:
    precision = equation.params.get("precision")
    pair = precision if isinstance(precision, tuple) else (precision, precision)
    single = all(jnp.dtype(v.aval.dtype) == jnp.float32 for v in equation.invars[:2])
    # Only float32 is split into passes; narrower products are one pass at any precision.
    known = [_PASSES.get(one, 1) for one in pair] if single else [1]
    return Flops(flops, flops * max(known))

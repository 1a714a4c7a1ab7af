"""FLOPs of a function, counted in its jaxpr: matrix products and convolutions, a multiply-add is 2.

Unlike XLA's `cost_analysis()`, which counts the body of a loop once, this counts every round of a
scan, and what a rematerialization policy computes again counts again. Inside `shard_map` shapes are
those of a device, and count for each device.
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

# How many bfloat16 products a float32 product of this precision consists of on a TPU's matrix unit
# (jax.lax.Precision; openxla/xla, xla_data.proto, PrecisionConfig).
_PASSES = {Precision.DEFAULT: 1, Precision.HIGH: 3, Precision.HIGHEST: 6}


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs of all devices together.

    Attributes:
      total: a multiply-add is 2, whatever its precision.
      passes: `total` in units of the matrix unit's own products: a float32 product of highest
        precision counts six times.
      uncounted: what has FLOPs that are not in `total`, in words.
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
    """Of one call of `function`, which is traced and not run.

    Args:
      arguments: arrays, or `jax.ShapeDtypeStruct` in their place.
    """
    return jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> Flops:
    """Of one run of `jaxpr`. Of the branches of a conditional the most expensive counts."""
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
    """The jaxprs among the parameters of an equation. A custom rule's function is one of them."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item


def _manual_axes(params: dict[str, Any]) -> frozenset[str]:
    """The axes of the mesh along which a `shard_map` sees parts (JAX has had both names)."""
    return params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]


def _dot_flops(equation: core.JaxprEqn) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)


def _convolution_flops(equation: core.JaxprEqn) -> float:
    """Every place of the kernel on every place of the result, zeros between inputs left out."""
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
    known = [_PASSES.get(one, 1) for one in pair] if single else [1]
    return Flops(flops, flops * max(known))

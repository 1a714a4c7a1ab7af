"""Attention for TPUs whose whole sequence fits beside the cores: images and captions.

A program of the kernel holds the queries, keys and values of one example, 200 or 600 tokens wide
as the model is, and computes its scores head by head in fast memory (VMEM): they never are in main
memory, where they would be most of what a layer moves. There is no loop over blocks of keys and no
running softmax, which long sequences need (Dao et al. 2022, "FlashAttention"), and the backward
pass computes the scores again from queries and keys, so that nothing else is kept.

The heads stay where the projections put them, side by side along the width. A matrix unit takes 128
columns at once: narrower heads are computed in groups of 128 columns, the other heads of the group
being zero in one of the factors, which takes the same time as the head alone and moves no data.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

LANES = 128  # columns of a TPU's matrix and vector units
MASKED = -1e30  # the score of what is not seen; finite, so that a masked row is no NaN
# Of the 16 MiB that a kernel has by default on v5e, what the arrays of one example may take, twice:
# while one is computed the next is fetched.
VMEM_BYTES = 14 * 2**20

_WIDTHS = (((1,), (1,)), ((), ()))  # a @ b.T
_TOKENS = (((0,), (0,)), ((), ()))  # a.T @ b
_PLAIN = (((1,), (0,)), ((), ()))  # a @ b


def check_shapes(tokens: int, keys: int, heads: int, head_dim: int, itemsize: int) -> None:
    """Raises ValueError if the kernel does not hold these shapes, and says why.

    Args:
      tokens, keys: lengths of the sequences of queries and of keys.
      itemsize: bytes of an element.
    """
    if (LANES % head_dim and head_dim % LANES) or (heads * head_dim) % LANES:
        raise ValueError(
            f"attention 'pallas' takes heads that fill columns of {LANES}: {heads} heads of "
            f"{head_dim} do not; take attention 'xla'"
        )
    width = heads * head_dim
    rows = [_round_up(n, 8) for n in (tokens, keys)]
    # Backward: q, k, v, the gradient of the output, and the gradients of the first three.
    blocks = 2 * width * itemsize * (3 * rows[0] + 4 * rows[1])
    scores = 6 * rows[0] * _round_up(keys, LANES) * 4
    if blocks + scores > VMEM_BYTES:
        raise ValueError(
            f"attention 'pallas' holds an example in fast memory: {tokens} x {keys} tokens of "
            f"{width} need {(blocks + scores) / 2**20:.0f} MiB of {VMEM_BYTES / 2**20:.0f}; take "
            "attention 'xla', or shard the heads"
        )


def short_attention(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch keys width"],
    value: Float[Array, "batch keys width"],
    lengths: Int[Array, " batch"] | None = None,
    *,
    head_dim: int,
    causal: bool = False,
    interpret: bool = False,
) -> Float[Array, "batch tokens width"]:
    """softmax(query key / sqrt(head_dim)) value of heads side by side, on one TPU.

    Args:
      lengths: of each example only the first so many keys are seen; at least 1. None for all.
      head_dim: width of a head; the scores are float32.
      causal: query i sees keys up to i alone.
      interpret: run it as plain JAX, on any device, to test it.

    Raises:
      ValueError: shapes that the kernel does not hold, see `check_shapes`.
    """
    batch, tokens, width = query.shape
    keys, heads = key.shape[1], width // head_dim
    check_shapes(tokens, keys, heads, head_dim, query.dtype.itemsize)
    spec = _Spec(heads, head_dim, tokens, keys, causal, lengths is not None, interpret)
    if lengths is None:
        lengths = jnp.full((batch,), keys, jnp.int32)
    return _attention(spec, lengths.astype(jnp.int32), query, key, value)


@dataclasses.dataclass(frozen=True)
class _Spec:
    """What the kernels are specialized to."""

    heads: int
    head_dim: int
    tokens: int
    keys: int
    causal: bool
    padded: bool  # not all keys are seen
    interpret: bool

    @property
    def group(self) -> int:
        """Columns that are computed at once."""
        return max(LANES, self.head_dim)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def cost(self, products: int, arrays: int, itemsize: int, batch: int) -> pl.CostEstimate:
        """With the products as the matrix unit computes them, in whole columns.

        Args:
          products: matrix products of tokens x keys x columns for each head.
          arrays: read and written, [batch, tokens, width].
        """
        keys = _round_up(self.keys, LANES)
        tokens = _round_up(self.tokens, 8)
        heads = batch * self.heads
        return pl.CostEstimate(
            flops=2 * products * heads * tokens * keys * max(LANES, self.head_dim),
            transcendentals=heads * tokens * keys,
            bytes_accessed=arrays
            * batch
            * max(tokens, _round_up(self.keys, 8))
            * self.width
            * itemsize,
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(spec: _Spec, lengths: Array, query: Array, key: Array, value: Array) -> Array:
    return _forward(spec, lengths, query, key, value)[0]


def _forward(
    spec: _Spec, lengths: Array, query: Array, key: Array, value: Array
) -> tuple[Array, tuple[Array, ...]]:
    out = _call(spec, _forward_kernel, 2, lengths, (query, key, value), (query,))
    return out[0], (lengths, query, key, value)


def _backward(spec: _Spec, residuals: tuple[Array, ...], gradient: Array) -> tuple[Any, ...]:
    lengths, query, key, value = residuals
    inputs = (query, key, value, gradient)
    return (None, *_call(spec, _backward_kernel, 5, lengths, inputs, (query, key, value)))


_attention.defvjp(_forward, _backward)


def _call(
    spec: _Spec,
    kernel: Any,
    products: int,
    lengths: Array,
    inputs: tuple[Array, ...],
    outputs: tuple[Array, ...],
) -> tuple[Array, ...]:
    """Runs a kernel for each example; `outputs` have the shapes of its results."""

    def block(x: Array) -> pl.BlockSpec:
        return pl.BlockSpec((None, *x.shape[1:]), lambda example, lengths: (example, 0, 0))

    batch, itemsize = len(lengths), inputs[0].dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, spec),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(batch,),
            in_specs=[block(x) for x in inputs],
            out_specs=[block(x) for x in outputs],
        ),
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in outputs],
        cost_estimate=spec.cost(products, len(inputs) + len(outputs), itemsize, batch),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=spec.interpret,
        name=kernel.__name__.strip("_"),
    )(lengths, *inputs)


def _each_group(spec: _Spec, body: Any) -> None:
    """Calls `body(columns)` for each group of columns that is computed at once."""

    def step(index: Array, _: None) -> None:
        body(pl.ds(pl.multiple_of(index * spec.group, LANES), spec.group))

    jax.lax.fori_loop(0, spec.width // spec.group, step, None)


def _masks(spec: _Spec) -> list[Array | None]:
    """For each head of a group, which of the group's columns are its own; None for all."""
    if spec.group == spec.head_dim:
        return [None]
    column = jax.lax.broadcasted_iota(jnp.int32, (1, spec.group), 1)
    starts = range(0, spec.group, spec.head_dim)
    return [(column >= start) & (column < start + spec.head_dim) for start in starts]


def _own(mask: Array | None, x: Array) -> Array:
    """`x` with zeros in the columns of other heads."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _product(a: Array, b: Array, dims: Any) -> Array:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _exponentials(spec: _Spec, length: Array | None, query: Array, key: Array) -> Array:
    """exp(score - the row's maximum), [tokens, keys], float32."""
    # The unit for exponentials computes powers of 2.
    scores = _product(query, key, _WIDTHS) * (spec.scale * math.log2(math.e))
    seen = []
    if length is not None:
        seen.append(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) < length)
    if spec.causal:
        row = jax.lax.broadcasted_iota(jnp.int32, scores.shape, 0)
        seen.append(jax.lax.broadcasted_iota(jnp.int32, scores.shape, 1) <= row)
    for visible in seen:
        scores = jnp.where(visible, scores, MASKED)
    return jnp.exp2(scores - scores.max(axis=1, keepdims=True))


def _length(spec: _Spec, lengths: Any) -> Array | None:
    return lengths[pl.program_id(0)] if spec.padded else None


def _forward_kernel(spec: _Spec, lengths: Any, query: Any, key: Any, value: Any, out: Any) -> None:
    length = _length(spec, lengths)

    def group(columns: Any) -> None:
        q, k, v = query[:, columns], key[:, columns], value[:, columns]
        total = None
        for mask in _masks(spec):
            weights = _exponentials(spec, length, _own(mask, q), k)
            part = _product(weights.astype(v.dtype), v, _PLAIN)
            part = part * (1 / weights.sum(axis=1, keepdims=True))
            total = part if total is None else jnp.where(mask, part, total)
        out[:, columns] = total.astype(out.dtype)

    _each_group(spec, group)


def _backward_kernel(
    spec: _Spec,
    lengths: Any,
    query: Any,
    key: Any,
    value: Any,
    gradient: Any,
    to_query: Any,
    to_key: Any,
    to_value: Any,
) -> None:
    length = _length(spec, lengths)

    def group(columns: Any) -> None:
        q, k, v, g = query[:, columns], key[:, columns], value[:, columns], gradient[:, columns]
        totals = None
        for mask in _masks(spec):
            q_own, g_own = _own(mask, q), _own(mask, g)
            weights = _exponentials(spec, length, q_own, k)
            # The weights stay without their factor 1 / sum: it is applied to rows of the narrower
            # arrays.
            factor = 1 / weights.sum(axis=1, keepdims=True)
            slopes = _product(g_own, v, _WIDTHS)
            mean = (weights * slopes).sum(axis=1, keepdims=True) * factor
            slopes = (weights * (slopes - mean)).astype(q.dtype)
            factor = factor * spec.scale
            parts = (
                _product(slopes, k, _PLAIN) * factor,
                _product(slopes, (q_own * factor).astype(q.dtype), _TOKENS),
                _product(
                    weights.astype(g.dtype),
                    (g_own * (factor / spec.scale)).astype(g.dtype),
                    _TOKENS,
                ),
            )
            totals = (
                parts
                if totals is None
                else (
                    jnp.where(mask, parts[0], totals[0]),
                    totals[1] + parts[1],  # zero outside of the head's own columns
                    totals[2] + parts[2],
                )
            )
        for target, total in zip((to_query, to_key, to_value), totals, strict=True):
            target[:, columns] = total.astype(target.dtype)

    _each_group(spec, group)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to

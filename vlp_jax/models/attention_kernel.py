"""A TPU kernel for attention over short sequences (images, captions), which fit in fast memory.

One program of the kernel handles one example, of about 200 to 600 tokens. It loads all queries,
keys and values into fast memory (VMEM) and computes the scores head by head there. The scores never
reach main memory, where they would be most of a layer's traffic. Unlike FlashAttention (Dao et al.
2022), which is for long sequences, there is no loop over blocks of keys and no running softmax. The
backward pass computes the scores again from queries and keys, so nothing else is saved.

Heads stay side by side along the width, as the projections write them: [tokens, heads * head_dim].
The matrix unit works on 128 columns at once, so narrower heads share a group. With heads of 64:

    columns   0..63   64..127       q masked for head 0:  q0  0
    group 0   head 0  head 1        k unmasked:           k0  k1
    group 1   head 2  head 3        product over 128:     q0 k0 + 0 k1 = the scores of head 0

A masked product takes the time of 128 columns, which the matrix unit would need for 64 as well, and
no data is moved to separate the heads.
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
MASKED = -1e30  # score of a hidden key; finite, because a row of -inf would give NaN
# Bytes for the arrays of two examples: one is computed while the next is fetched. A kernel on v5e
# has 16 MiB by default; 2 MiB are left for temporaries.
VMEM_BYTES = 14 * 2**20

# `dimension_numbers` of matrix products, by the dimension that is contracted.
_WIDTHS = (((1,), (1,)), ((), ()))  # a @ b.T
_TOKENS = (((0,), (0,)), ((), ()))  # a.T @ b
_PLAIN = (((1,), (0,)), ((), ()))  # a @ b


def check_shapes(tokens: int, keys: int, heads: int, head_dim: int, itemsize: int) -> None:
    """Raises ValueError for shapes, and `itemsize` bytes of a number, that do not fit."""
    if (LANES % head_dim and head_dim % LANES) or (heads * head_dim) % LANES:
        raise ValueError(
            f"attention 'pallas' takes heads that fill columns of {LANES}: {heads} heads of "
            f"{head_dim} do not; take attention 'xla'"
        )
    width = heads * head_dim
    rows = [_round_up(n, 8) for n in (tokens, keys)]  # VMEM holds tiles of 8 x 128
    # The backward pass needs most: as many rows as queries for q and the gradients of q and of the
    # output, as many as keys for k, v and their gradients. Twice, see VMEM_BYTES.
    blocks = 2 * width * itemsize * (3 * rows[0] + 4 * rows[1])
    # The backward pass has at most about six float32 arrays of scores alive at once.
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
    """Computes softmax(query key / sqrt(head_dim)) value for heads side by side, on one TPU.

    Scores and softmax are float32. Raises ValueError for unsupported shapes (`check_shapes`).

    Args:
      lengths: only the first `lengths` keys of each example are seen; at least 1. None for all.
      causal: query i sees keys 0 to i.
      interpret: runs the kernel as plain JAX on any device, for tests.
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
    """The static arguments of the kernels."""

    heads: int
    head_dim: int
    tokens: int
    keys: int
    causal: bool
    padded: bool  # whether `lengths` hide keys
    interpret: bool

    @property
    def group(self) -> int:
        """The number of columns that are computed at once."""
        return max(LANES, self.head_dim)

    @property
    def width(self) -> int:
        return self.heads * self.head_dim

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    def cost(self, products: int, arrays: int, itemsize: int, batch: int) -> pl.CostEstimate:
        """Estimates the cost for XLA's scheduler, with products padded as in the matrix unit.

        Args:
          products: number of products of tokens x keys x columns for each head.
          arrays: number of arrays [batch, tokens, width] that are read or written.
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
    """Runs a kernel once for each example; `outputs` have the shapes and dtypes of the results."""

    def block(x: Array) -> pl.BlockSpec:
        # None drops the batch dimension: the kernel sees [tokens, width].
        return pl.BlockSpec((None, *x.shape[1:]), lambda example, lengths: (example, 0, 0))

    batch, itemsize = len(lengths), inputs[0].dtype.itemsize
    return pl.pallas_call(
        functools.partial(kernel, spec),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,  # `lengths` go to scalar memory before the kernel starts
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
    """Calls `body(columns)` for each group of columns."""

    def step(index: Array, _: None) -> None:
        # Without the hint the compiler cannot prove that the slice is aligned to a tile.
        body(pl.ds(pl.multiple_of(index * spec.group, LANES), spec.group))

    jax.lax.fori_loop(0, spec.width // spec.group, step, None)


def _masks(spec: _Spec) -> list[Array | None]:
    """Returns for each head of a group a mask of its columns; [None] if a head fills the group."""
    if spec.group == spec.head_dim:
        return [None]
    column = jax.lax.broadcasted_iota(jnp.int32, (1, spec.group), 1)
    starts = range(0, spec.group, spec.head_dim)
    return [(column >= start) & (column < start + spec.head_dim) for start in starts]


def _mask_columns(mask: Array | None, x: Array) -> Array:
    """Sets the columns of other heads to zero."""
    return x if mask is None else jnp.where(mask, x, jnp.zeros_like(x))


def _product(a: Array, b: Array, dims: Any) -> Array:
    precision = "highest" if a.dtype == jnp.float32 else None
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _exponentials(spec: _Spec, length: Array | None, query: Array, key: Array) -> Array:
    """Computes exp(score - maximum of the row): [tokens, keys], float32."""
    # exp(x) = 2^(x log2 e): the hardware computes powers of 2, and the scale takes up the factor.
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
            weights = _exponentials(spec, length, _mask_columns(mask, q), k)
            # v is not masked: `part` is right in this head's columns, and the others are dropped
            # below.
            part = _product(weights.astype(v.dtype), v, _PLAIN)
            # Dividing the output [tokens, 128] is cheaper than dividing the weights [tokens, keys].
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
            q_head, g_head = _mask_columns(mask, q), _mask_columns(mask, g)
            weights = _exponentials(spec, length, q_head, k)
            # P = weights * factor is the softmax. As in the forward pass, `factor` multiplies the
            # narrow arrays and not the scores.
            factor = 1 / weights.sum(axis=1, keepdims=True)
            slopes = _product(g_head, v, _WIDTHS)  # dL/dP
            # dL/dscores = P (dL/dP - sum(P dL/dP)), the gradient of a softmax.
            mean = (weights * slopes).sum(axis=1, keepdims=True) * factor
            slopes = (weights * (slopes - mean)).astype(q.dtype)
            factor = factor * spec.scale
            parts = (
                _product(slopes, k, _PLAIN) * factor,  # for the query
                _product(slopes, (q_head * factor).astype(q.dtype), _TOKENS),  # for the key
                _product(  # for the value
                    weights.astype(g.dtype),
                    (g_head * (factor / spec.scale)).astype(g.dtype),
                    _TOKENS,
                ),
            )
            totals = (
                parts
                if totals is None
                else (
                    jnp.where(mask, parts[0], totals[0]),
                    # Key and value: the masked factor makes other heads' columns zero.
                    totals[1] + parts[1],
                    totals[2] + parts[2],
                )
            )
        for target, total in zip((to_query, to_key, to_value), totals, strict=True):
            target[:, columns] = total.astype(target.dtype)

    _each_group(spec, group)


def _round_up(n: int, to: int) -> int:
    return -(-n // to) * to

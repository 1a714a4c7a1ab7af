"""Attention of several heads: the ways to compute it, and the one place that chooses.

| name | devices | what it is |
|---|---|---|
| `xla` | all | two products, and a float32 softmax between them |
| `xla_bf16` | all | the same with scores and softmax in the type of the computation |
| `xla_padded` | all | `xla` with sequences filled up to whole tiles of a TPU, 128 tokens |
| `pallas` | TPU | `attention_kernel`: scores never leave fast memory |
| `cudnn` | GPU | cuDNN's fused attention, by way of `jax.nn.dot_product_attention` |

All give the same numbers within the precision of the computation. The one that is named runs, or
there is an error; so there is for a mask that it does not hold (`HOLDS`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from vlp_jax.models.attention_kernel import LANES, short_attention
from vlp_jax.models.attention_mask import CAUSAL, KINDS, LENGTHS, SEE_ALL, AttentionMask

Heads = Float[Array, "batch tokens heads head_dim"]
Attention = Callable[[Heads, Heads, Heads, AttentionMask], Heads]


def _xla(query: Heads, key: Heads, value: Heads, mask: AttentionMask) -> Heads:
    # Lengths and causality are told as such, for which JAX makes no array of its own.
    plain = {CAUSAL, LENGTHS}.issuperset(mask.kinds())
    told = {"is_causal": mask.causal, "key_value_seq_lengths": mask.lengths}
    if not plain:
        told = {"mask": mask.visible(query.shape[1], key.shape[1])}
    return jax.nn.dot_product_attention(query, key, value, implementation="xla", **told)


def _cudnn(query: Heads, key: Heads, value: Heads, mask: AttentionMask) -> Heads:
    # JAX turns an array of a mask into a bias, for which cuDNN is slower; lengths and causality it
    # takes as such.
    try:
        return jax.nn.dot_product_attention(
            query,
            key,
            value,
            is_causal=mask.causal,
            key_value_seq_lengths=mask.lengths,
            implementation="cudnn",
        )
    except (NotImplementedError, RuntimeError) as error:  # a dtype, a width, no cuDNN
        raise ValueError(f"attention 'cudnn' refuses: {error}; take attention 'xla'") from error


def _xla_bf16(query: Heads, key: Heads, value: Heads, mask: AttentionMask) -> Heads:
    shared = query.shape[2] // key.shape[2]  # heads of queries for one of keys
    key, value = (jnp.repeat(x, shared, axis=2) if shared > 1 else x for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    seen = mask.visible(query.shape[1], key.shape[1])
    if seen is not None:
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def _padded(
    attention: Attention,
    multiple: int,
    query: Heads,
    key: Heads,
    value: Heads,
    mask: AttentionMask,
) -> Heads:
    """`attention` of sequences that are filled up to a multiple; nothing sees what fills them."""
    batch, tokens, keys = query.shape[0], query.shape[1], key.shape[1]

    def pad(x: Heads) -> Heads:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))

    if mask.lengths is None and keys % multiple:
        mask = mask.replace(lengths=jnp.full((batch,), keys, jnp.int32))
    return attention(pad(query), pad(key), pad(value), mask)[:, :tokens]


def _pallas(query: Heads, key: Heads, value: Heads, mask: AttentionMask) -> Heads:
    flat = (einops.rearrange(x, "b t h d -> b t (h d)") for x in (query, key, value))
    out = attend_flat(*flat, head_dim=query.shape[3], mask=mask)
    return einops.rearrange(out, "b t (h d) -> b t h d", h=query.shape[2])


def attend_flat(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch keys width"],
    value: Float[Array, "batch keys width"],
    *,
    head_dim: int,
    mask: AttentionMask = SEE_ALL,
) -> Float[Array, "batch tokens width"]:
    """`attend` by "pallas", with the heads side by side, as the kernel takes them.

    It runs on each device's examples and heads: the compiler cannot divide it up itself.

    Raises:
      ValueError: shapes or a mask that the kernel does not hold.
    """
    mask.check("pallas", HOLDS["pallas"])
    heads = query.shape[-1] // head_dim
    if key.shape[-1] != query.shape[-1]:
        raise ValueError(
            f"attention 'pallas' takes as many heads of keys as of queries, not "
            f"{key.shape[-1] // head_dim} and {heads}; take attention 'xla'"
        )

    def run(*arrays: Array) -> Array:
        return short_attention(*arrays, head_dim=head_dim, causal=mask.causal)

    arrays = (query, key, value) if mask.lengths is None else (query, key, value, mask.lengths)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return run(*arrays)
    spec = _spec(("batch", "act_tokens", "act_heads"), (*query.shape[:2], heads), mesh)
    specs = (spec, spec, spec, PartitionSpec(spec[0]))[: len(arrays)]
    return jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
    """The mesh axes of each dimension by its logical name, where they divide it."""
    found = []
    axes_of = (*nn.logical_to_mesh_axes(names), *(None,) * len(names))
    for axes, dim in zip(axes_of, shape, strict=False):
        parts = (axes,) if isinstance(axes, str) else tuple(axes or ())
        size = math.prod(mesh.shape[axis] for axis in parts)
        found.append(parts if parts and dim % size == 0 else None)
    return PartitionSpec(*found)


ATTENTIONS: dict[str, Attention] = {
    "xla": _xla,
    "xla_bf16": _xla_bf16,
    "xla_padded": functools.partial(_padded, _xla, LANES),
    "pallas": _pallas,
    # JAX refuses odd lengths in training: patches and a class token, or one query of a pooling.
    "cudnn": functools.partial(_padded, _cudnn, 2),
}
# The rules of a mask that each holds.
HOLDS: dict[str, tuple[str, ...]] = {
    "xla": KINDS,
    "xla_bf16": KINDS,
    "xla_padded": (CAUSAL, LENGTHS),
    "pallas": (CAUSAL, LENGTHS),
    "cudnn": (CAUSAL, LENGTHS),
}
# Those that run on one kind of device alone: name -> `jax.Device.platform`.
ONLY_ON = {"pallas": ("tpu",), "cudnn": ("gpu", "cuda")}


def attend(
    query: Heads,
    key: Float[Array, "batch keys kv_heads head_dim"],
    value: Float[Array, "batch keys kv_heads head_dim"],
    *,
    implementation: str,
    mask: AttentionMask = SEE_ALL,
) -> Heads:
    """softmax(query key / sqrt(head_dim)) value (Vaswani et al. 2017, 3.2.1).

    Args:
      key, value: heads that divide those of the queries; each is for as many in a row.
      implementation: a name in `ATTENTIONS`.
      mask: which keys each query sees; each query must see one.

    Raises:
      ValueError: an unknown implementation, or one that does not hold this mask, these shapes or
        devices.
    """
    if implementation not in ATTENTIONS:
        known = ", ".join(ATTENTIONS)
        raise ValueError(f"unknown attention {implementation!r} (known: {known})")
    mask.check(implementation, HOLDS[implementation])
    return ATTENTIONS[implementation](query, key, value, mask)

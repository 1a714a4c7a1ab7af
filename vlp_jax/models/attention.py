"""Attention: masks, backends, and `attend`, the one place that chooses a backend.

| name | devices | implementation |
|---|---|---|
| `xla` | all | two products with a float32 softmax between them |
| `xla_bf16` | all | like `xla`, with scores and softmax in the compute dtype |
| `xla_padded` | all | `xla` on sequences padded to whole tiles of a TPU, 128 tokens |
| `pallas` | TPU | `attention_kernel`: scores never leave fast memory |
| `cudnn` | GPU | cuDNN's fused attention, through `jax.nn.dot_product_attention` |

All backends return the same numbers within the precision of the computation. There is no fallback:
a backend that does not run on these devices, or does not support the mask (`HOLDS`), raises.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Collection

import einops
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from vlp_jax.models.attention_kernel import LANES, short_attention
from vlp_jax.models.values import check_choice

CAUSAL, LENGTHS = "causal", "lengths"
KINDS = (CAUSAL, "offset", "prefix", LENGTHS, "segments", "explicit")


@flax.struct.dataclass
class AttentionMask:
    """Describes which keys each query sees: the keys that all given rules allow.

    For 4 tokens, rows are queries, columns are keys, and x is "sees":

        causal        prefix=2      lengths=3     segments=0011
        x . . .       x x . .       x x x .       x x . .
        x x . .       x x . .       x x x .       x x . .
        x x x .       x x x .       x x x .       . . x x
        x x x x       x x x x       x x x .       . . x x

    Attributes:
      causal: query i sees keys 0 to i; `offset` and `prefix` need it.
      offset: the position of the first query among the keys, for decoding with a cache; None for 0.
      prefix: all queries of an example see its first `prefix` keys (Raffel et al. 2020, "T5",
        3.2.1).
      lengths: only the first `lengths` keys of each example are seen; at least 1.
      segments: the segment of each token. A query sees the keys of its segment alone, so several
        texts can share a sequence. Queries and keys must be the same tokens.
      explicit: True where a query sees a key; a dimension of size 1 is broadcast.
    """

    causal: bool = flax.struct.field(pytree_node=False, default=False)
    offset: Int[Array, ""] | None = None
    prefix: Int[Array, " batch"] | None = None
    lengths: Int[Array, " batch"] | None = None
    segments: Int[Array, "batch tokens"] | None = None
    explicit: Bool[Array, "#batch #heads #queries #keys"] | None = None

    def kinds(self) -> tuple[str, ...]:
        """Returns the names of the given rules, from `KINDS`; ValueError if one lacks `causal`."""
        for name in ("prefix", "offset"):
            if getattr(self, name) is not None and not self.causal:
                raise ValueError(f"a mask with {name} needs causal=True: without it all see all")
        # False becomes None, so that all rules are tested alike; the order is the order of KINDS.
        rules = (self.causal or None, self.offset, self.prefix, self.lengths, self.segments)
        given = (*rules, self.explicit)
        return tuple(kind for kind, value in zip(KINDS, given, strict=True) if value is not None)

    def check(self, who: str, holds: Collection[str]) -> None:
        """Raises ValueError for a rule that the backend `who`, which supports `holds`, lacks."""
        refused = [kind for kind in self.kinds() if kind not in holds]
        if refused:
            raise ValueError(
                f"attention {who!r} holds no mask with {' and '.join(refused)} (it holds: "
                f"{', '.join(holds) or 'none'}); take attention 'xla'"
            )

    def visible(self, queries: int, keys: int) -> Bool[Array, "#batch #heads queries keys"] | None:
        """Makes the mask as an array, True where a query sees a key; None if no rule is given.

        Raises:
          ValueError: see `kinds`; or segments whose length differs from queries or keys.
        """
        row, column = jnp.arange(queries)[:, None], jnp.arange(keys)
        if self.offset is not None:
            # Queries begin at `offset`, keys at 0: the cache holds the keys before them.
            row = row + self.offset
        rules = []
        if CAUSAL in self.kinds():
            seen = column <= row
            if self.prefix is not None:
                seen = seen | (column < self.prefix[:, None, None, None])
            rules.append(seen)
        if self.lengths is not None:
            rules.append(column < self.lengths[:, None, None, None])
        if self.segments is not None:
            if not self.segments.shape[1] == queries == keys:
                raise ValueError(
                    f"segments of {self.segments.shape[1]} tokens are not for {queries} queries "
                    f"and {keys} keys"
                )
            rules.append(self.segments[:, None, :, None] == self.segments[:, None, None, :])
        if self.explicit is not None:
            rules.append(self.explicit)
        if not rules:
            return None
        seen = functools.reduce(jnp.logical_and, rules)
        return seen.reshape((1,) * (4 - seen.ndim) + seen.shape)  # causal alone is 2-dimensional


SEE_ALL = AttentionMask()


Heads = Float[Array, "batch tokens heads head_dim"]
KeyHeads = Float[Array, "batch keys kv_heads head_dim"]
Attention = Callable[[Heads, Heads, Heads, AttentionMask], Heads]


def _xla(query: Heads, key: KeyHeads, value: KeyHeads, mask: AttentionMask) -> Heads:
    # JAX applies lengths and causality without an array [queries, keys]; other rules need one.
    plain = {CAUSAL, LENGTHS}.issuperset(mask.kinds())
    told = {"is_causal": mask.causal, "key_value_seq_lengths": mask.lengths}
    if not plain:
        told = {"mask": mask.visible(query.shape[1], key.shape[1])}
    return jax.nn.dot_product_attention(query, key, value, implementation="xla", **told)


def _cudnn(query: Heads, key: KeyHeads, value: KeyHeads, mask: AttentionMask) -> Heads:
    # JAX would turn an array of a mask into a bias, for which cuDNN is slower.
    told = {"is_causal": mask.causal, "key_value_seq_lengths": mask.lengths}
    try:
        return jax.nn.dot_product_attention(query, key, value, implementation="cudnn", **told)
    except (NotImplementedError, RuntimeError) as error:  # a dtype, a width, no cuDNN
        raise ValueError(f"attention 'cudnn' refuses: {error}; take attention 'xla'") from error


def _xla_bf16(query: Heads, key: KeyHeads, value: KeyHeads, mask: AttentionMask) -> Heads:
    shared = query.shape[2] // key.shape[2]  # query heads per key head (GQA)
    key, value = (jnp.repeat(x, shared, axis=2) if shared > 1 else x for x in (key, value))
    scores = jnp.einsum("bqhd,bkhd->bhqk", query * query.shape[-1] ** -0.5, key)
    seen = mask.visible(query.shape[1], key.shape[1])
    if seen is not None:
        # Finite, because a row of -inf would give NaN.
        scores = jnp.where(seen, scores, jnp.finfo(scores.dtype).min)
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def _padded(
    attention: Attention,
    multiple: int,
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    mask: AttentionMask,
) -> Heads:
    """Computes attention of sequences filled up to a multiple; nothing sees what fills them."""
    batch, tokens, keys = query.shape[0], query.shape[1], key.shape[1]

    def pad(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, -x.shape[1] % multiple), (0, 0), (0, 0)))

    # Lengths hide the keys that are filled in; queries that are filled in are cut off at the end.
    if mask.lengths is None and keys % multiple:
        mask = mask.replace(lengths=jnp.full((batch,), keys, jnp.int32))
    return attention(pad(query), pad(key), pad(value), mask)[:, :tokens]


def _pallas(query: Heads, key: KeyHeads, value: KeyHeads, mask: AttentionMask) -> Heads:
    flat = (einops.rearrange(x, "b t h d -> b t (h d)") for x in (query, key, value))
    out = attend_flat(*flat, head_dim=query.shape[3], mask=mask)
    return einops.rearrange(out, "b t (h d) -> b t h d", h=query.shape[2])


def attend_flat(
    query: Float[Array, "batch tokens width"],
    key: Float[Array, "batch keys key_width"],
    value: Float[Array, "batch keys key_width"],
    *,
    head_dim: int,
    mask: AttentionMask = SEE_ALL,
) -> Float[Array, "batch tokens width"]:
    """Computes `attend` with the backend "pallas", for heads that lie side by side.

    Under a mesh it runs inside `shard_map`, on each device's examples and heads, because XLA cannot
    partition a kernel. Raises ValueError for shapes or a mask that the kernel does not support.
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
    # Lengths are [batch], and follow only the examples.
    specs = (spec, spec, spec, PartitionSpec(spec[0]))[: len(arrays)]
    # check_vma asks over which axes results vary, which a kernel's results do not say.
    return jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)(*arrays)


def _spec(
    names: tuple[str | None, ...], shape: tuple[int, ...], mesh: jax.sharding.AbstractMesh
) -> PartitionSpec:
    """Returns the mesh axes of each dimension by its logical name, where they divide it."""
    spec = []
    # Flax leaves out trailing dimensions without an axis.
    axes_of = (*nn.logical_to_mesh_axes(names), *(None,) * len(names))
    for axes, dim in zip(axes_of, shape, strict=False):
        parts = (axes,) if isinstance(axes, str) else tuple(axes or ())
        size = math.prod(mesh.shape[axis] for axis in parts)
        spec.append(parts if parts and dim % size == 0 else None)
    return PartitionSpec(*spec)


ATTENTIONS: dict[str, Attention] = {
    "xla": _xla,
    "xla_bf16": _xla_bf16,
    "xla_padded": functools.partial(_padded, _xla, LANES),
    "pallas": _pallas,
    # JAX refuses odd lengths in training: patches and a class token, or one query of a pooling.
    "cudnn": functools.partial(_padded, _cudnn, 2),
}
# The rules of a mask that each backend supports.
HOLDS: dict[str, tuple[str, ...]] = {
    "xla": KINDS,
    "xla_bf16": KINDS,
    "xla_padded": (CAUSAL, LENGTHS),
    "pallas": (CAUSAL, LENGTHS),
    "cudnn": (CAUSAL, LENGTHS),
}
# Backends that need a certain kind of device: name -> values of `jax.Device.platform`.
ONLY_ON = {"pallas": ("tpu",), "cudnn": ("gpu", "cuda")}


def attend(
    query: Heads,
    key: KeyHeads,
    value: KeyHeads,
    *,
    implementation: str,
    mask: AttentionMask = SEE_ALL,
) -> Heads:
    """Computes softmax(query key / sqrt(head_dim)) value (Vaswani et al. 2017, 3.2.1).

    Args:
      key, value: their number of heads divides the queries'. Each serves `heads / kv_heads`
        consecutive heads of queries.
      implementation: a name in `ATTENTIONS`.
      mask: the keys that each query sees; each query must see at least one.

    Raises:
      ValueError: an unknown backend, or one that does not support the mask, the shapes or the
        devices.
    """
    check_choice("attention", implementation, tuple(ATTENTIONS))
    mask.check(implementation, HOLDS[implementation])
    return ATTENTIONS[implementation](query, key, value, mask)

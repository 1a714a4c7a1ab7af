"""Multi-head attention with its projections."""

from __future__ import annotations

from collections.abc import Callable

import einops
import flax
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import SEE_ALL, AttentionMask, attend, attend_flat
from vlp_jax.models.dense import Product, norm
from vlp_jax.models.positions import rotate
from vlp_jax.models.values import ComputeConfig, TransformerConfig

# Both are [batch, tokens, heads, head_dim], or [batch, tokens, heads * head_dim].
KeysAndValues = tuple[Array, Array]


@flax.struct.dataclass
class Cache:
    """Keys and values of earlier tokens, so that a decoder computes only the new token.

    For stacked layers, each array has the layers as its first dimension. `own` has room for all
    tokens to come, of which `filled` are there, and one entry for each stack of layers if a model
    has several. `context` belongs to the tokens of a cross-attention, and is None before the first
    step.
    """

    own: KeysAndValues | tuple[KeysAndValues, ...]
    filled: Int[Array, ""]
    context: KeysAndValues | None = None


class ToHeads(Product):
    """Projects tokens to `heads` vectors of `head_dim` numbers each.

    `flat` vectors lie side by side, [.., heads * head_dim], for `attend_flat`. Otherwise the heads
    are a dimension of the product; a TPU's compiler then chooses the layout that attention wants.
    """

    heads: int = 1
    head_dim: int = 1
    flat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens heads head_dim"] | Float[Array, "batch tokens flat"]:
        heads = (self.heads, self.head_dim)
        x = self.product(x, (x.shape[-1], *heads), heads, flat=self.flat)
        names = ("batch", "act_tokens", "act_heads")
        return nn.with_logical_constraint(x, names if self.flat else (*names, None))


class FromHeads(Product):
    """Projects the heads' vectors, side by side or not, to `width` numbers for each token."""

    heads: int = 1
    width: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens heads head_dim"] | Float[Array, "batch tokens flat"]
    ) -> Float[Array, "batch tokens width"]:
        if x.ndim == 4:
            x = einops.rearrange(x, "... h d -> ... (h d)")
        heads = (self.heads, x.shape[-1] // self.heads)
        return self.product(x, (*heads, self.width), (self.width,))


class MultiHeadAttention(nn.Module):
    """Multi-head attention with its projections (Vaswani et al. 2017, 3.2.2)."""

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch query_tokens width"],
        key_value: Float[Array, "batch tokens key_width"],
        mask: AttentionMask = SEE_ALL,
        kept: KeysAndValues | None = None,
        filled: Int[Array, ""] | None = None,
        keep: bool = False,
    ) -> (
        Float[Array, "batch query_tokens width"]
        | tuple[Float[Array, "batch query_tokens width"], KeysAndValues]
    ):
        """Attends from `query` to `key_value`, where the mask allows it.

        Args:
          kept: cached keys and values. With `filled` they belong to that many earlier tokens, and
            the keys and values of `key_value` are written after them. Without `filled` they are
            complete, and `key_value` is ignored.
          keep: whether to return the keys and values as a second result.

        Raises:
          ValueError: the heads do not divide the width, or the backend does not support the shapes.
        """
        config, compute = self.config, self.compute
        q = self._projected(query, config.heads, "query")
        q = self._prepared(q, "query_norm", filled)
        k, v = self._keys_and_values(key_value, kept, filled)
        # Named after norm and rotation, so that a policy that keeps them repeats neither.
        q, k, v = _keep(q, "query"), _keep(k, "key"), _keep(v, "value")
        if q.ndim == 3:
            x = attend_flat(q, k, v, head_dim=config.head_width, mask=mask)
        else:
            x = attend(q, k, v, implementation=compute.attention, mask=mask)
        out = FromHeads(
            ("heads", "head_dim", "embed"),
            ("norm",),
            compute,
            use_bias=config.bias,
            heads=config.heads,
            width=query.shape[-1],
            name="out",
        )(_keep(x, "attention"))
        return (out, (k, v)) if keep else out

    def _keys_and_values(
        self, tokens: Array, kept: KeysAndValues | None, filled: Array | None
    ) -> KeysAndValues:
        """Returns the keys and values to attend to: new, cached, or new ones appended to cached."""
        if kept is not None and filled is None:
            return kept
        k = self._projected(tokens, self.config.key_heads, "key")
        k = self._prepared(k, "key_norm", filled)
        v = self._projected(tokens, self.config.key_heads, "value")
        if filled is None:
            return k, v
        return tuple(
            jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), filled, axis=1)
            for old, new in zip(kept, (k, v), strict=True)
        )

    def _projected(self, x: Array, heads: int, name: str) -> Array:
        return ToHeads(
            ("embed", "heads", "head_dim"),
            ("heads", "head_dim"),
            self.compute,
            use_bias=self.config.bias,
            heads=heads,
            head_dim=self.config.head_width,
            # Only this backend takes heads side by side.
            flat=self.compute.attention == "pallas",
            name=name,
        )(x)

    def _prepared(self, x: Array, name: str, first: Array | None) -> Array:
        """Applies `qk_norm` and rotary positions to queries or keys, as the config says."""
        if self.config.qk_norm:
            x = self._by_heads(norm(self.config, self.compute.dtype, name), x)
        if self.config.rope is not None:
            first = 0 if first is None else first
            x = self._by_heads(lambda heads: rotate(heads, self.config.rope, first), x)
        return x

    def _by_heads(self, function: Callable[[Array], Array], x: Array) -> Array:
        """Applies `function` to x reshaped as [batch, tokens, heads, head_dim]."""
        if x.ndim == 4:
            return function(x)
        heads = function(einops.rearrange(x, "... (h d) -> ... h d", d=self.config.head_width))
        return einops.rearrange(heads, "... h d -> ... (h d)")


def _keep(x: Array, name: str) -> Array:
    """Names `x` for remat policies, with its heads side by side.

    A TPU pads the last dimension to 128: saved as [.., heads, 64], an array takes twice the memory.
    """
    if x.ndim == 3:
        return checkpoint_name(x, name)
    flat = checkpoint_name(einops.rearrange(x, "... h d -> ... (h d)"), name)
    return einops.rearrange(flat, "... (h d) -> ... h d", h=x.shape[-2])

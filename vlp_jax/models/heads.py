"""Multi-head attention with its projections."""

from __future__ import annotations

from collections.abc import Callable

import einops
import flax
import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import attend, attend_flat
from vlp_jax.models.attention_mask import SEE_ALL, AttentionMask
from vlp_jax.models.dense import Product
from vlp_jax.models.parameters import norm
from vlp_jax.models.positions import rotate
from vlp_jax.models.values import ComputeConfig, TransformerConfig

# Both [batch, tokens, heads, head_dim], or with the heads side by side.
KeysAndValues = tuple[Array, Array]


@flax.struct.dataclass
class Cache:
    """Keys and values that a decoder has made, so that a further token costs its own alone.

    In a stack of layers each array has the layers as its first dimension.

    Attributes:
      own: of its tokens, with room for those to come.
      context: of the tokens that it looks at besides; None where there are none, or none yet.
      filled: how many of its tokens have theirs.
    """

    own: KeysAndValues
    filled: Int[Array, ""]
    context: KeysAndValues | None = None


class ToHeads(Product):
    """A projection of tokens to `heads` vectors of `head_dim` numbers each.

    Attributes:
      flat: these vectors stay side by side, as a kernel wants them that takes them so; the product
        is one of two matrices. To others a TPU's compiler gives the layout that they want, if the
        product has the heads as a dimension.
    """

    heads: int = 1
    head_dim: int = 1
    flat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens heads head_dim"] | Float[Array, "batch tokens width"]:
        heads = (self.heads, self.head_dim)
        x = self.product(x, (x.shape[-1], *heads), heads, flat=self.flat)
        names = ("batch", "act_tokens", "act_heads")
        return nn.with_logical_constraint(x, names if self.flat else (*names, None))


class FromHeads(Product):
    """A projection of the heads' vectors, side by side or not, to `width` numbers a token."""

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
    """Multi-head attention with its projections (Vaswani et al. 2017, 3.2.2).

    Attributes:
      config: the heads, their width, norm, biases and rotary positions.
      compute: how; the softmax is float32 in any case.
    """

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch query_tokens width"],
        key_value: Float[Array, "batch tokens width"],
        mask: AttentionMask = SEE_ALL,
        kept: KeysAndValues | None = None,
        filled: Int[Array, ""] | None = None,
        keep: bool = False,
    ) -> (
        Float[Array, "batch query_tokens width"]
        | tuple[Float[Array, "batch query_tokens width"], KeysAndValues]
    ):
        """Attends to the tokens that the mask lets it see.

        Args:
          kept: keys and values that were made before: with `filled` those of the tokens before
            these, with room behind them, into which those of `key_value` go; without, all that
            there are, and `key_value` is not looked at.
          filled: how many tokens have theirs in `kept`.
          keep: the keys and values are a second result.

        Raises:
          ValueError: the heads do not divide the width, or the attention that is asked for does not
            hold these shapes.
        """
        config, compute = self.config, self.compute
        q = self._projected(query, config.heads, "query")
        q = self._prepared(q, "query_norm", filled)
        k, v = self._keys_and_values(key_value, kept, filled)
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
        """Those of the tokens, put behind those that were kept; or those that were kept alone."""
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
            flat=self.compute.attention == "pallas",
            name=name,
        )(x)

    def _prepared(self, x: Array, name: str, first: Array | None) -> Array:
        """Queries or keys of each head, normalized and turned where the config says so."""
        if self.config.qk_norm:
            x = self._by_heads(norm(self.config, self.compute.dtype, name), x)
        if self.config.rope is not None:
            first = 0 if first is None else first
            x = self._by_heads(lambda heads: rotate(heads, self.config.rope, first), x)
        return x

    def _by_heads(self, function: Callable[[Array], Array], x: Array) -> Array:
        """`function` of x as [batch, tokens, heads, head_dim]."""
        if x.ndim == 4:
            return function(x)
        heads = function(einops.rearrange(x, "... (h d) -> ... h d", d=self.config.head_width))
        return einops.rearrange(heads, "... h d -> ... (h d)")


def _keep(x: Array, name: str) -> Array:
    """`x` under a name that a remat policy can keep, with its heads side by side.

    As [.., heads, head_dim] a TPU would keep a head of 64 numbers in 128 places.
    """
    if x.ndim == 3:
        return checkpoint_name(x, name)
    flat = checkpoint_name(einops.rearrange(x, "... h d -> ... (h d)"), name)
    return einops.rearrange(flat, "... (h d) -> ... h d", h=x.shape[-2])

"""Multi-head attention with its projections."""

from __future__ import annotations

from collections.abc import Callable

import einops
import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from vlp_jax.models.attention import attend, attend_flat
from vlp_jax.models.attention_mask import SEE_ALL, AttentionMask
from vlp_jax.models.dense import Product
from vlp_jax.models.parameters import norm
from vlp_jax.models.positions import rotate
from vlp_jax.models.values import ComputeConfig, TransformerConfig


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
    ) -> Float[Array, "batch query_tokens width"]:
        """Attends to the tokens that the mask lets it see.

        Raises:
          ValueError: the heads do not divide the width, or the attention that is asked for does not
            hold these shapes.
        """
        config, compute = self.config, self.compute
        flat = compute.attention == "pallas"

        def project(x: Array, heads: int, name: str) -> Array:
            return ToHeads(
                ("embed", "heads", "head_dim"),
                ("heads", "head_dim"),
                compute,
                use_bias=config.bias,
                heads=heads,
                head_dim=config.head_width,
                flat=flat,
                name=name,
            )(x)

        q = project(query, config.heads, "query")
        k = project(key_value, config.key_heads, "key")
        v = project(key_value, config.key_heads, "value")
        if config.qk_norm:
            q, k = self._each_head(q, "query_norm"), self._each_head(k, "key_norm")
        if config.rope is not None:
            q, k = self._rotated(q), self._rotated(k)
        q, k, v = _keep(q, "query"), _keep(k, "key"), _keep(v, "value")
        if flat:
            x = attend_flat(q, k, v, head_dim=config.head_width, mask=mask)
        else:
            x = attend(q, k, v, implementation=compute.attention, mask=mask)
        return FromHeads(
            ("heads", "head_dim", "embed"),
            ("norm",),
            compute,
            use_bias=config.bias,
            heads=config.heads,
            width=query.shape[-1],
            name="out",
        )(_keep(x, "attention"))

    def _each_head(self, x: Array, name: str) -> Array:
        normalize = norm(self.config, self.compute.dtype, name)
        return self._by_heads(normalize, x)

    def _rotated(self, x: Array) -> Array:
        return self._by_heads(lambda heads: rotate(heads, self.config.rope), x)

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

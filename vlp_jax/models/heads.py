"""Multi-head attention with its projections."""

from __future__ import annotations

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import attend, attend_flat
from vlp_jax.models.dense import Product
from vlp_jax.models.parameters import Dtype, layer_norm


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
    """Multi-head attention with a `heads`-way split of the width (Vaswani et al. 2017, 3.2.2).

    Attributes:
      heads: number of heads; must divide the width.
      causal: position i sees only positions up to i.
      qk_norm: LayerNorm of each head's queries and keys (Dehghani et al. 2023, "ViT-22B", 2.2).
      norm_eps: of these.
      implementation: a name in `attention.ATTENTIONS`. The one named here is the one that runs; one
        that does not hold the shapes raises.
      dtype: of the computation. The softmax is float32.
    """

    heads: int
    causal: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    implementation: str = "xla"
    quantization: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        query: Float[Array, "batch query_tokens width"],
        key_value: Float[Array, "batch tokens width"],
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch query_tokens width"]:
        """Attends to the first `lengths[i]` tokens of sequence i, to all of them if None."""
        width = query.shape[-1]
        if width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide the width {width}")

        flat = self.implementation == "pallas"

        def project(x: Array, name: str) -> Array:
            return ToHeads(
                ("embed", "heads", "head_dim"),
                ("heads", "head_dim"),
                quantization=self.quantization,
                dtype=self.dtype,
                heads=self.heads,
                head_dim=width // self.heads,
                flat=flat,
                name=name,
            )(x)

        q, k, v = project(query, "query"), project(key_value, "key"), project(key_value, "value")
        if self.qk_norm:
            q, k = self._norm(q, "query_norm"), self._norm(k, "key_norm")
        q, k, v = _keep(q, "query"), _keep(k, "key"), _keep(v, "value")
        if flat:
            x = attend_flat(q, k, v, heads=self.heads, causal=self.causal, lengths=lengths)
        else:
            implementation, causal = self.implementation, self.causal
            x = attend(q, k, v, implementation=implementation, causal=causal, lengths=lengths)
        return FromHeads(
            ("heads", "head_dim", "embed"),
            ("norm",),
            quantization=self.quantization,
            dtype=self.dtype,
            heads=self.heads,
            width=width,
            name="out",
        )(_keep(x, "attention"))

    def _norm(self, x: Array, name: str) -> Array:
        norm = layer_norm(self.norm_eps, self.dtype, name)
        if x.ndim == 4:
            return norm(x)
        heads = norm(einops.rearrange(x, "... (h d) -> ... h d", h=self.heads))
        return einops.rearrange(heads, "... h d -> ... (h d)")


def _keep(x: Array, name: str) -> Array:
    """`x` under a name that a remat policy can keep, with its heads side by side.

    As [.., heads, head_dim] a TPU would keep a head of 64 numbers in 128 places.
    """
    if x.ndim == 3:
        return checkpoint_name(x, name)
    flat = checkpoint_name(einops.rearrange(x, "... h d -> ... (h d)"), name)
    return einops.rearrange(flat, "... (h d) -> ... h d", h=x.shape[-2])

"""Multi-head attention with its projections."""

from __future__ import annotations

import einops
import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import attend
from vlp_jax.models.dense import Product
from vlp_jax.models.parameters import Dtype, layer_norm


class ToHeads(Product):
    """A projection of tokens to `heads` vectors of `head_dim` numbers each.

    Attributes:
      flat: the product is one of two matrices, whose result is split up afterwards, as a kernel
        that takes the heads side by side wants it. To others a TPU's compiler gives the layout
        that they want, if the product has the heads as a dimension.
    """

    heads: int = 1
    head_dim: int = 1
    flat: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens heads head_dim"]:
        heads = (self.heads, self.head_dim)
        x = self.product(x, (x.shape[-1], *heads), heads, flat=self.flat)
        return einops.rearrange(x, "... (h d) -> ... h d", h=self.heads) if self.flat else x


class FromHeads(Product):
    """A projection of the heads' vectors to `width` numbers a token."""

    width: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens heads head_dim"]
    ) -> Float[Array, "batch tokens width"]:
        heads = x.shape[-2:]
        x = einops.rearrange(x, "... h d -> ... (h d)")
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

        def project(x: Array, name: str) -> Array:
            x = ToHeads(
                ("embed", "heads", "head_dim"),
                ("heads", "head_dim"),
                quantization=self.quantization,
                dtype=self.dtype,
                heads=self.heads,
                head_dim=width // self.heads,
                flat=self.implementation == "pallas",
                name=name,
            )(x)
            return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_heads", None))

        q, k = project(query, "query"), project(key_value, "key")
        if self.qk_norm:
            q = layer_norm(self.norm_eps, self.dtype, "query_norm")(q)
            k = layer_norm(self.norm_eps, self.dtype, "key_norm")(k)
        q, k, v = _keep(q, "query"), _keep(k, "key"), _keep(project(key_value, "value"), "value")
        x = attend(
            q,
            k,
            v,
            implementation=self.implementation,
            causal=self.causal,
            lengths=lengths,
        )
        x = _keep(x, "attention")
        return FromHeads(
            ("heads", "head_dim", "embed"),
            ("norm",),
            quantization=self.quantization,
            dtype=self.dtype,
            width=width,
            name="out",
        )(x)


def _keep(x: Float[Array, "*batch heads head_dim"], name: str) -> Array:
    """`x` under a name that a remat policy can keep, with its heads side by side.

    As [.., heads, head_dim] a TPU would keep a head of 64 numbers in 128 places.
    """
    flat = checkpoint_name(einops.rearrange(x, "... h d -> ... (h d)"), name)
    return einops.rearrange(flat, "... (h d) -> ... h d", h=x.shape[-2])

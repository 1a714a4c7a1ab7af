"""Transformer layers that the image and the text encoder share.

Every parameter has logical axis names:

| name | dimension |
|---|---|
| `embed` | width of the residual stream |
| `mlp` | hidden width of the feed-forward layer |
| `heads`, `head_dim` | attention heads and their width |
| `vocab`, `tokens` | token ids, positions |
| `layers` | the stacked layers of a scanned encoder |
| `patch_height`, `patch_width`, `channels` | pixels of a patch, color channels |
| `projection` | width of the shared image-text embedding |

Activations are constrained by `batch`, `act_tokens`, `act_embed`, `act_heads` and `act_mlp`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.dense import Dense
from vlp_jax.models.heads import MultiHeadAttention
from vlp_jax.models.parameters import Dtype, layer_norm, named
from vlp_jax.models.remat import REMAT_POLICIES

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP, clip/model.py QuickGELU
}


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    """`table[name]`; a ValueError that lists the known names if there is none."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(sorted(table))})")
    return table[name]


class Mlp(nn.Module):
    """The feed-forward layer: width -> `mlp_dim` -> activation -> width."""

    mlp_dim: int
    activation: str = "gelu_tanh"
    quantization: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = x.shape[-1]
        x = self._dense(self.mlp_dim, "up", ("embed", "mlp"), ("mlp",))(x)
        x = checkpoint_name(x, "mlp_hidden")
        x = choose(ACTIVATIONS, self.activation, "activation")(x)
        if x.ndim == 3:
            x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_mlp"))
        return self._dense(width, "down", ("mlp", "embed"), ("norm",))(x)

    def _dense(
        self, features: int, name: str, kernel_names: tuple[str, ...], bias_names: tuple[str, ...]
    ) -> Dense:
        return Dense(
            kernel_names,
            bias_names,
            nn.initializers.normal(1e-6),
            self.quantization,
            self.dtype,
            features,
            name=name,
        )


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al. 2021, "CaiT", 2.1)."""

    init: float
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        constant = named(nn.initializers.constant(self.init), "norm")
        scale = self.param("scale", constant, (x.shape[-1],), jnp.float32)
        return x * scale.astype(self.dtype)


class Block(nn.Module):
    """A pre-norm Transformer layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      layer_scale: initial `LayerScale` of both branches; None for none.
    """

    heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    causal: bool = False
    norm_eps: float = 1e-6
    qk_norm: bool = False
    layer_scale: float | None = None
    attention: str = "xla"
    quantization: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        drop_rate: Float[Array, ""] | None = None,
        lengths: Int[Array, " batch"] | None = None,
    ) -> Float[Array, "batch tokens width"]:
        """
        Args:
          drop_rate: chance that a branch is left out for an example (needs the random stream
            "drop_path"); None for never.
          lengths: tokens of each sequence that are seen; None for all.
        """
        y = layer_norm(self.norm_eps, self.dtype, "norm_attention")(x)
        y = MultiHeadAttention(
            self.heads,
            self.causal,
            self.qk_norm,
            self.norm_eps,
            self.attention,
            self.quantization,
            self.dtype,
            name="attention",
        )(y, y, lengths)
        x = x + self._branch(y, drop_rate, "layer_scale_attention")
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        y = layer_norm(self.norm_eps, self.dtype, "norm_mlp")(x)
        y = Mlp(self.mlp_dim, self.activation, self.quantization, self.dtype, name="mlp")(y)
        x = x + self._branch(y, drop_rate, "layer_scale_mlp")
        return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))

    def _branch(self, y: Array, drop_rate: Array | None, name: str) -> Array:
        if self.layer_scale is not None:
            y = LayerScale(self.layer_scale, self.dtype, name=name)(y)
        if drop_rate is None:
            return y
        kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (len(y), 1, 1))
        return jnp.where(kept, y / (1 - drop_rate).astype(y.dtype), 0)


class Encoder(nn.Module):
    """`depth` blocks and a final LayerNorm.

    Attributes:
      stochastic_depth: chance that a branch of the last layer is left out in training; it rises
        linearly from 0 at the first (Huang et al. 2016, "Deep Networks with Stochastic Depth").
      final_norm: whether there is the LayerNorm at the end.
      scan_layers: the layers are one `nn.scan` over parameters stacked along a leading `layers`
        axis, so that compile time does not grow with depth; otherwise each layer stands alone.
      remat: "none", or a name in `REMAT_POLICIES`: what the backward pass computes again.
    """

    depth: int
    heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    causal: bool = False
    norm_eps: float = 1e-6
    qk_norm: bool = False
    layer_scale: float | None = None
    stochastic_depth: float = 0.0
    final_norm: bool = True
    attention: str = "xla"
    quantization: str = "none"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        lengths: Int[Array, " batch"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """`train` with stochastic depth needs the random stream "drop_path"."""
        block = Block
        if self.remat != "none":
            policy = choose(REMAT_POLICIES, self.remat, "remat policy")
            # Inside a scan the loop itself keeps XLA from merging the two forward passes.
            block = nn.remat(Block, policy=policy, prevent_cse=not self.scan_layers)
        fields = dict(
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            causal=self.causal,
            norm_eps=self.norm_eps,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            attention=self.attention,
            quantization=self.quantization,
            dtype=self.dtype,
        )
        drops = train and self.stochastic_depth > 0
        rates = jnp.linspace(0, self.stochastic_depth, self.depth) if drops else None
        if self.scan_layers:
            scan = nn.scan(
                lambda layer, carry, rate, lengths: (layer(carry, rate, lengths), None),
                variable_axes={"params": 0},
                split_rngs={"params": True, "drop_path": True},
                in_axes=(0, nn.broadcast),
                length=self.depth,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            x, _ = scan(block(**fields, name="layers"), x, rates, lengths)
        else:
            for index in range(self.depth):
                rate = rates[index] if drops else None
                x = block(**fields, name=f"layer_{index}")(x, rate, lengths)
        return layer_norm(self.norm_eps, self.dtype, "norm")(x) if self.final_norm else x


class AttentionPooling(nn.Module):
    """One learned query attends to all tokens, followed by a residual feed-forward layer.

    The multi-head attention pooling ("MAP head") of Zhai et al. 2022, "Scaling Vision
    Transformers".
    """

    heads: int
    mlp_dim: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], lengths: Int[Array, " batch"] | None = None
    ) -> Float[Array, "batch width"]:
        """Pools the first `lengths[i]` tokens of sequence i, all of them if None."""
        batch, _, width = x.shape
        probe = self.param(
            "probe", named(nn.initializers.xavier_uniform(), None, "embed"), (1, width)
        )
        probe = jnp.broadcast_to(probe.astype(self.dtype), (batch, 1, width))
        x = MultiHeadAttention(self.heads, dtype=self.dtype, name="attention")(probe, x, lengths)
        y = layer_norm(self.norm_eps, self.dtype, "norm")(x)
        return (x + Mlp(self.mlp_dim, self.activation, dtype=self.dtype, name="mlp")(y))[:, 0]


def position_embedding(module: nn.Module, tokens: int, width: int, stddev: float) -> Array:
    """A learned embedding per position, `[tokens, width]`, a parameter of `module`."""
    return module.param(
        "position_embedding",
        named(nn.initializers.normal(stddev), "tokens", "embed"),
        (tokens, width),
    )


def transformer_flops(depth: int, tokens: int, width: int, mlp_dim: int) -> float:
    """Forward FLOPs of `depth` layers on one sequence: matrix products alone, a multiply-add is 2.

    Per layer 8 n w^2 for the four projections, 4 n^2 w for the two products of attention and
    4 n w m for the feed-forward layer.
    """
    n, w, m = tokens, width, mlp_dim
    return float(depth * (8 * n * w * w + 4 * n * n * w + 4 * n * w * m))


def attention_pooling_flops(tokens: int, width: int, mlp_dim: int) -> float:
    """Forward FLOPs of `AttentionPooling` on one sequence: one query, keys and values of all."""
    n, w, m = tokens, width, mlp_dim
    return float(4 * n * w * w + 4 * w * w + 4 * n * w + 4 * w * m)

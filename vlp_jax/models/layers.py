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
from jaxtyping import Array, Float, Int

Dtype = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP, clip/model.py QuickGELU
}

REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    # What the backward pass may keep of a layer; everything else is computed again.
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def choose(table: dict[str, Any], name: str, what: str) -> Any:
    """`table[name]`; a ValueError that lists the known names if there is none."""
    if name not in table:
        raise ValueError(f"unknown {what} {name!r} (known: {', '.join(sorted(table))})")
    return table[name]


class Named(nn.LogicallyPartitioned):
    """A parameter with the logical names of its dimensions.

    Unboxing adds no sharding constraint: `nn.DenseGeneral` unboxes a kernel while it is still flat,
    where the names do not fit, and the step is given its parameters already laid out.
    """

    def unbox(self, apply_constraint: bool = False) -> Any:
        """The bare parameter."""
        return self.value


def named(init: Callable[..., Array], *names: str | None) -> Callable[..., Named]:
    """An initializer whose parameter carries the logical axis `names`."""

    @functools.wraps(init)
    def initialize(*args: Any, **kwargs: Any) -> Named:
        return Named(init(*args, **kwargs), names)

    return initialize


def layer_norm(eps: float, dtype: Dtype, name: str) -> nn.LayerNorm:
    """LayerNorm over the last dimension with float32 statistics and parameters."""
    return nn.LayerNorm(
        epsilon=eps,
        dtype=dtype,
        name=name,
        use_fast_variance=False,
        scale_init=named(nn.initializers.ones_init(), "norm"),
        bias_init=named(nn.initializers.zeros_init(), "norm"),
    )


class MultiHeadAttention(nn.Module):
    """Multi-head attention with a `heads`-way split of the width (Vaswani et al. 2017, 3.2.2).

    Attributes:
      heads: number of heads; must divide the width.
      causal: position i sees only positions up to i.
      qk_norm: LayerNorm of each head's queries and keys (Dehghani et al. 2023, "ViT-22B", 2.2).
      norm_eps: of these.
      implementation: backend of `jax.nn.dot_product_attention`, "xla" or "cudnn". The one named
        here is the one that runs; a backend that does not hold the shapes raises.
      dtype: of the computation. The softmax is float32.
    """

    heads: int
    causal: bool = False
    qk_norm: bool = False
    norm_eps: float = 1e-6
    implementation: str = "xla"
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
            x = nn.DenseGeneral(
                (self.heads, width // self.heads),
                dtype=self.dtype,
                name=name,
                kernel_init=named(nn.initializers.xavier_uniform(), "embed", "heads", "head_dim"),
                bias_init=named(nn.initializers.zeros_init(), "heads", "head_dim"),
            )(x)
            return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_heads", None))

        q, k = project(query, "query"), project(key_value, "key")
        if self.qk_norm:
            q = layer_norm(self.norm_eps, self.dtype, "query_norm")(q)
            k = layer_norm(self.norm_eps, self.dtype, "key_norm")(k)
        x = jax.nn.dot_product_attention(
            q,
            k,
            project(key_value, "value"),
            is_causal=self.causal,
            key_value_seq_lengths=lengths,
            implementation=self.implementation,
        )
        return nn.DenseGeneral(
            width,
            axis=(-2, -1),
            dtype=self.dtype,
            name="out",
            kernel_init=named(nn.initializers.xavier_uniform(), "heads", "head_dim", "embed"),
            bias_init=named(nn.initializers.zeros_init(), "norm"),
        )(x)


class Mlp(nn.Module):
    """The feed-forward layer: width -> `mlp_dim` -> activation -> width."""

    mlp_dim: int
    activation: str = "gelu_tanh"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = x.shape[-1]
        x = nn.Dense(
            self.mlp_dim,
            dtype=self.dtype,
            name="up",
            kernel_init=named(nn.initializers.xavier_uniform(), "embed", "mlp"),
            bias_init=named(nn.initializers.normal(1e-6), "mlp"),
        )(x)
        x = choose(ACTIVATIONS, self.activation, "activation")(x)
        if x.ndim == 3:
            x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_mlp"))
        return nn.Dense(
            width,
            dtype=self.dtype,
            name="down",
            kernel_init=named(nn.initializers.xavier_uniform(), "mlp", "embed"),
            bias_init=named(nn.initializers.normal(1e-6), "norm"),
        )(x)


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
            self.dtype,
            name="attention",
        )(y, y, lengths)
        x = x + self._branch(y, drop_rate, "layer_scale_attention")
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        y = layer_norm(self.norm_eps, self.dtype, "norm_mlp")(x)
        y = Mlp(self.mlp_dim, self.activation, self.dtype, name="mlp")(y)
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
        return (x + Mlp(self.mlp_dim, self.activation, self.dtype, name="mlp")(y))[:, 0]


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

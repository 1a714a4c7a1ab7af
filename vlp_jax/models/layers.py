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
import math
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import attend
from vlp_jax.models.quantization import dot_general_of

Dtype = Any

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP, clip/model.py QuickGELU
}

# What a layer names of its activations, so that a policy can speak of it: queries, keys and values,
# the heads' output before it is projected, and the feed-forward layer before its activation.
NAMES = ("query", "key", "value", "attention", "mlp_hidden")

REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    # What the backward pass may keep of a layer; everything else is computed again.
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES),
    # Half of it: no matrix product of attention is repeated, one of the feed-forward layer is.
    "names_lean": jax.checkpoint_policies.save_only_these_names(*NAMES[:-1]),
    # All of it, in the memory of the host while it is not needed.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
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


class _Heads(nn.Module):
    """What `ToHeads` and `FromHeads` share: a product whose kernel has the heads as a dimension.

    Parameters have the shapes and initial values of `nn.DenseGeneral`. The product is one of two
    matrices all the same, and its result is split up or joined afterwards: in a product with a
    dimension of heads, a TPU's compiler takes layouts that others do not have, and copies.
    """

    kernel_names: tuple[str, ...]
    bias_names: tuple[str, ...]
    quantization: str = "none"
    dtype: Dtype = jnp.float32

    def product(
        self,
        x: Float[Array, "*batch n"],
        kernel_shape: tuple[int, ...],
        bias_shape: tuple[int, ...],
    ) -> Float[Array, "*batch m"]:
        """x @ kernel + bias, the kernel being [n, m] once it is flat."""
        width = math.prod(bias_shape)

        def xavier(key: Array, shape: tuple[int, ...], dtype: Dtype) -> Array:
            flat = nn.initializers.xavier_uniform()(key, (x.shape[-1], width), dtype)
            return flat.reshape(shape)

        kernel = self.param("kernel", named(xavier, *self.kernel_names), kernel_shape, jnp.float32)
        zeros = named(nn.initializers.zeros_init(), *self.bias_names)
        bias = self.param("bias", zeros, bias_shape, jnp.float32)
        x, kernel, bias = (a.astype(self.dtype) for a in (x, kernel, bias))
        multiply = dot_general_of(self.quantization) or jax.lax.dot_general
        kernel = kernel.reshape(x.shape[-1], width)
        return multiply(x, kernel, (((x.ndim - 1,), (0,)), ((), ()))) + bias.reshape(width)


class ToHeads(_Heads):
    """A projection of tokens to `heads` vectors of `head_dim` numbers each."""

    heads: int = 1
    head_dim: int = 1

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"]
    ) -> Float[Array, "batch tokens heads head_dim"]:
        heads = (self.heads, self.head_dim)
        x = self.product(x, (x.shape[-1], *heads), heads)
        return einops.rearrange(x, "... (h d) -> ... h d", h=self.heads)


class FromHeads(_Heads):
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
                self.quantization,
                self.dtype,
                self.heads,
                width // self.heads,
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
            self.quantization,
            self.dtype,
            width,
            name="out",
        )(x)


def _keep(x: Float[Array, "*batch heads head_dim"], name: str) -> Array:
    """`x` under a name that a remat policy can keep, with its heads side by side.

    As [.., heads, head_dim] a TPU would keep a head of 64 numbers in 128 places.
    """
    flat = checkpoint_name(einops.rearrange(x, "... h d -> ... (h d)"), name)
    return einops.rearrange(flat, "... (h d) -> ... h d", h=x.shape[-2])


class Mlp(nn.Module):
    """The feed-forward layer: width -> `mlp_dim` -> activation -> width."""

    mlp_dim: int
    activation: str = "gelu_tanh"
    quantization: str = "none"
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        width = x.shape[-1]
        x = nn.Dense(
            self.mlp_dim,
            dtype=self.dtype,
            dot_general=dot_general_of(self.quantization),
            name="up",
            kernel_init=named(nn.initializers.xavier_uniform(), "embed", "mlp"),
            bias_init=named(nn.initializers.normal(1e-6), "mlp"),
        )(x)
        x = checkpoint_name(x, "mlp_hidden")
        x = choose(ACTIVATIONS, self.activation, "activation")(x)
        if x.ndim == 3:
            x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_mlp"))
        return nn.Dense(
            width,
            dtype=self.dtype,
            dot_general=dot_general_of(self.quantization),
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

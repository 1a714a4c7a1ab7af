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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention import SEE_ALL, AttentionMask
from vlp_jax.models.dense import Dense, Dtype, named, norm
from vlp_jax.models.heads import Cache, KeysAndValues, MultiHeadAttention
from vlp_jax.models.values import ComputeConfig, TransformerConfig, check_choice

# Names that layers give their activations, for policies: queries, keys and values, the heads'
# output before its projection, and the feed-forward layer's hidden units before their activation.
NAMES = ("query", "key", "value", "attention", "mlp_hidden")
# Mean and variance of each token in the norms: two numbers that save reading the whole token again.
STATISTICS = ("norm_mean", "norm_variance")

REMAT_POLICIES: dict[str, Callable[..., Any]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "names": jax.checkpoint_policies.save_only_these_names(*NAMES, *STATISTICS),
    # Half the memory of "names": the first product of the feed-forward layer is repeated too.
    "names_lean": jax.checkpoint_policies.save_only_these_names(*NAMES[:-1], *STATISTICS),
    # The activations of "names" wait in the host's memory until the backward pass.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(STATISTICS),
        names_which_can_be_offloaded=list(NAMES),
        offload_src="device",
        offload_dst="pinned_host",
    ),
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # OpenAI CLIP, clip/model.py QuickGELU
    "silu": jax.nn.silu,
}


class Mlp(nn.Module):
    """The feed-forward layer: width -> `mlp_dim` -> activation -> width.

    If it is gated, the activation is of one inner product, "gate", and multiplies the other, "up".
    """

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        config, width = self.config, x.shape[-1]
        check_choice("activation", config.activation, tuple(ACTIVATIONS))
        activation = ACTIVATIONS[config.activation]
        up = self._inner("up", x)
        x = activation(self._inner("gate", x)) * up if config.gated else activation(up)
        # The constraint names three dimensions; other ranks have no names for theirs.
        if x.ndim == 3:
            x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_mlp"))
        return self._dense(width, "down", ("mlp", "embed"), ("norm",))(x)

    def _inner(self, name: str, x: Array) -> Array:
        x = self._dense(self.config.mlp_dim, name, ("embed", "mlp"), ("mlp",))(x)
        return checkpoint_name(x, "mlp_hidden")

    def _dense(
        self, features: int, name: str, kernel_names: tuple[str, ...], bias_names: tuple[str, ...]
    ) -> Dense:
        return Dense(
            kernel_names,
            bias_names,
            self.compute,
            # As in google-research/vision_transformer and big_vision, `MlpBlock`.
            bias_init=nn.initializers.normal(1e-6),
            use_bias=self.config.bias,
            features=features,
            name=name,
        )


@flax.struct.dataclass
class Attended:
    """Tokens, of any width, that a layer attends to besides its own, and who sees which of them."""

    tokens: Float[Array, "batch context context_width"]
    mask: AttentionMask = SEE_ALL


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

    Between the two there may be x + attention(norm(x), context), to tokens of another kind.
    """

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        drop_rate: Float[Array, ""] | None = None,
        mask: AttentionMask = SEE_ALL,
        context: Attended | None = None,
        cache: Cache | None = None,
    ) -> Float[Array, "batch tokens width"] | tuple[Float[Array, "batch tokens width"], Cache]:
        """Returns the tokens after the layer, and with `cache` the cache after these tokens.

        Args:
          drop_rate: chance that a branch is left out for an example (needs the random stream
            "drop_path"); None for never.
          context: tokens to attend to besides.
          cache: the cache of the tokens before these.
        """
        attend = functools.partial(self._attend, drop_rate=drop_rate)
        own = seen = None
        if cache is None:
            x, _ = attend(x, None, mask, "attention")
        else:
            x, own = attend(x, None, mask, "attention", cache.own, cache.filled, keep=True)
        if context is not None:
            kept, keep = (None, False) if cache is None else (cache.context, True)
            tokens = context.tokens
            x, seen = attend(x, tokens, context.mask, "cross_attention", kept, keep=keep)
        x = self._feed(x, drop_rate)
        return x if cache is None else (x, Cache(own, cache.filled, seen))

    def _feed(self, x: Array, drop_rate: Array | None) -> Array:
        """Adds the feed-forward layer of each token."""
        y = norm(self.config, self.compute.dtype, "norm_mlp")(x)
        y = Mlp(self.config, self.compute, name="mlp")(y)
        x = x + self._branch(y, drop_rate, "layer_scale_mlp")
        return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))

    def _attend(
        self,
        x: Array,
        to: Array | None,
        mask: AttentionMask,
        name: str,
        kept: KeysAndValues | None = None,
        filled: Array | None = None,
        keep: bool = False,
        drop_rate: Array | None = None,
    ) -> tuple[Array, KeysAndValues | None]:
        """x plus its attention to itself, or to other tokens; and the keys and values, if kept."""
        y = norm(self.config, self.compute.dtype, f"norm_{name}")(x)
        # Places of other tokens are in these themselves.
        config = self.config if to is None else dataclasses.replace(self.config, rope=None)
        attention = MultiHeadAttention(config, self.compute, name=name)
        found = attention(y, y if to is None else to, mask, kept, filled, keep)
        y, pair = found if keep else (found, None)
        x = x + self._branch(y, drop_rate, f"layer_scale_{name}")
        return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed")), pair

    def _branch(self, y: Array, drop_rate: Array | None, name: str) -> Array:
        if self.config.layer_scale is not None:
            y = LayerScale(self.config.layer_scale, self.compute.dtype, name=name)(y)
        if drop_rate is None:
            return y
        # One draw for all tokens of an example. The division keeps the mean.
        kept = jax.random.bernoulli(self.make_rng("drop_path"), 1 - drop_rate, (len(y), 1, 1))
        return jnp.where(kept, y / (1 - drop_rate).astype(y.dtype), 0)


class Encoder(nn.Module):
    """All layers, each made and called as `block`, and with `final_norm` a last norm."""

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()
    final_norm: bool = True
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: AttentionMask = SEE_ALL,
        train: bool = False,
        context: Attended | None = None,
        cache: Cache | None = None,
    ) -> Float[Array, "batch tokens width"] | tuple[Float[Array, "batch tokens width"], Cache]:
        """Takes the arguments of `Block`; dropping depth needs the random stream "drop_path"."""
        config, compute, block = self.config, self.compute, self.block
        if compute.remat != "none":
            check_choice("remat policy", compute.remat, tuple(REMAT_POLICIES))
            policy = REMAT_POLICIES[compute.remat]
            # A loop keeps XLA from merging the two forward passes; written out, nothing else does.
            block = nn.remat(block, policy=policy, prevent_cse=not compute.scan_layers)
        drops = train and config.stochastic_depth > 0
        # An array, and not numbers: a scan runs one program for all layers.
        rates = jnp.linspace(0, config.stochastic_depth, config.depth) if drops else None
        # `each` is sliced, a part for a layer. `told` is the same for all layers.
        each = None if cache is None else (cache.own, cache.context)
        told = (mask, context, None if cache is None else cache.filled)
        scan = nn.scan(
            _layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=((0, 0), nn.broadcast),
            length=config.depth,
            # A scan unrolled to its full length is no loop any more; its parameters stay stacked.
            unroll=1 if compute.scan_layers else config.depth,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        x, made = scan(block(config, compute, name="layers"), x, (rates, each), told)
        x = norm(config, compute.dtype, "norm")(x) if self.final_norm else x
        if cache is None:
            return x
        return x, Cache(made[0], cache.filled + x.shape[1], made[1])


def _layer(
    layer: nn.Module, x: Array, own: tuple[Any, Any], told: tuple[Any, Any, Any]
) -> tuple[Array, tuple[KeysAndValues, KeysAndValues | None] | None]:
    """A layer as the body of a loop: (what goes on, what is collected)."""
    (rate, kept), (mask, context, filled) = own, told
    if kept is None:
        return layer(x, rate, mask, context), None
    x, cache = layer(x, rate, mask, context, Cache(kept[0], filled, kept[1]))
    return x, (cache.own, cache.context)


class AttentionPooling(nn.Module):
    """One learned query attends to all tokens, followed by a residual feed-forward layer.

    The multi-head attention pooling ("MAP head") of Zhai et al. 2022, "Scaling Vision
    Transformers". The query has no position, and neither it nor the keys are normalized.
    """

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens width"], mask: AttentionMask = SEE_ALL
    ) -> Float[Array, "batch width"]:
        """Pools the tokens that the mask lets the one query see."""
        batch, _, width = x.shape
        config = dataclasses.replace(self.config, qk_norm=False, rope=None)
        probe = self.param(
            "probe", named(nn.initializers.xavier_uniform(), None, "embed"), (1, width)
        )
        probe = jnp.broadcast_to(probe.astype(self.compute.dtype), (batch, 1, width))
        x = MultiHeadAttention(config, self.compute, name="attention")(probe, x, mask)
        y = norm(config, self.compute.dtype, "norm")(x)
        return (x + Mlp(config, self.compute, name="mlp")(y))[:, 0]


def look_up(
    table: Float[Array, "vocab width"], tokens: Int[Array, "batch tokens"], dtype: Dtype
) -> Float[Array, "batch tokens width"]:
    """Returns the row of each token id.

    The table is gathered along its width first: otherwise the gradient of a sharded table makes
    the compiler gather the whole batch instead.
    """
    table = nn.with_logical_constraint(table.astype(dtype), ("vocab", "act_embed"))
    return jnp.take(table, tokens, axis=0)


def add_positions(
    x: Float[Array, "batch tokens width"],
    table: Float[Array, "positions width"],
    first: Int[Array, ""] | int = 0,
) -> Float[Array, "batch tokens width"]:
    """Adds the rows of a table from `first` on; `first` is traced where a cache counts it."""
    table = table.astype(x.dtype)
    if isinstance(first, int):
        return x + table[first : first + x.shape[1]]
    return x + jax.lax.dynamic_slice_in_dim(table, first, x.shape[1])


def position_embedding(module: nn.Module, tokens: int, width: int, stddev: float) -> Array:
    """A learned embedding per position, `[tokens, width]`, a parameter of `module`."""
    init = named(nn.initializers.normal(stddev), "tokens", "embed")
    return module.param("position_embedding", init, (tokens, width))

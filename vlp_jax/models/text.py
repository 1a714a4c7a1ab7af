"""Text Transformer: causal (CLIP), bidirectional (SigLIP), with a padding mask (BERT)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers, variants
from vlp_jax.models.variants import check_choice

POOLINGS = ("eos", "argmax", "first", "last", "mean", "map", "none")


class TokenEmbedding(nn.Module):
    """A row of a learned table for each token id.

    The table is gathered along its width before the look-up: otherwise the gradient of a sharded
    table makes the compiler gather the whole batch instead.
    """

    vocab_size: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        table = self.param(
            "embedding",
            layers.named(nn.initializers.normal(0.02), "vocab", "embed"),
            (self.vocab_size, self.width),
        )
        table = nn.with_logical_constraint(table.astype(self.dtype), ("vocab", "act_embed"))
        return jnp.take(table, tokens, axis=0)


class TextTransformer(nn.Module):
    """Token ids to one vector, or to one of each token.

    Attributes:
      vocab_size: number of token ids.
      context_length: length of a sequence, padding included.
      causal: each token sees only those before it (Radford et al. 2021, CLIP).
      pooling: "eos" (at the first `eos_id`), "argmax" (at the highest token id, which in CLIP's
        vocabulary is the end of text), "first" and "last" (that position), "mean" (over tokens that
        are not `pad_id`), "map" (`AttentionPooling`, over all positions that are seen) or "none"
        (all tokens are returned, those of the padding too).
      padding_mask: no token sees what lies behind the last one that is not `pad_id` (Devlin et al.
        2019, BERT).
      qk_norm, layer_scale, stochastic_depth: see `layers.Block` and `layers.Encoder`.
      eos_id, pad_id: the tokenizer's.
    """

    vocab_size: int
    context_length: int
    width: int
    depth: int
    mlp_dim: int
    heads: int
    causal: bool = True
    pooling: str = "eos"
    eos_id: int = 1
    pad_id: int = 0
    padding_mask: bool = False
    qk_norm: bool = False
    layer_scale: float | None = None
    stochastic_depth: float = 0.0
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    attention: str = "xla"
    quantization: str = "none"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch width"] | Float[Array, "batch tokens width"]:
        """Pooled features, in `dtype`.

        Args:
          train: whether stochastic depth is at work (it needs the random stream "drop_path").

        Raises:
          ValueError: the sequences have another length than `context_length`.
        """
        if tokens.shape[1] != self.context_length:
            raise ValueError(f"the model takes {self.context_length} tokens, not {tokens.shape[1]}")
        x = TokenEmbedding(self.vocab_size, self.width, self.dtype, name="token_embedding")(tokens)
        positions = layers.position_embedding(self, self.context_length, self.width, 0.01)
        x = x + positions.astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        lengths = self.lengths(tokens) if self.padding_mask else None
        x = layers.Encoder(
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            causal=self.causal,
            norm_eps=self.norm_eps,
            qk_norm=self.qk_norm,
            layer_scale=self.layer_scale,
            stochastic_depth=self.stochastic_depth,
            attention=self.attention,
            quantization=self.quantization,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            name="encoder",
        )(x, lengths, train)
        return self._pool(x, tokens, lengths)

    def lengths(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, " batch"]:
        """Tokens up to the last that is no padding; one at least, since attention needs one."""
        last = jnp.max(jnp.where(tokens != self.pad_id, jnp.arange(tokens.shape[1]), 0), axis=1)
        return (last + 1).astype(jnp.int32)

    def _pool(
        self,
        x: Float[Array, "batch tokens width"],
        tokens: Int[Array, "batch tokens"],
        lengths: Int[Array, " batch"] | None,
    ) -> Float[Array, "batch *tokens width"]:
        if self.pooling == "none":
            return x
        if self.pooling in ("eos", "argmax"):
            marks = tokens == self.eos_id if self.pooling == "eos" else tokens
            position = jnp.argmax(marks, axis=1)
            return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]
        if self.pooling == "first":
            return x[:, 0]
        if self.pooling == "last":
            return x[:, -1]
        if self.pooling == "mean":
            weight = (tokens != self.pad_id).astype(jnp.float32)[..., None]
            mean = (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
            return mean.astype(x.dtype)
        if self.pooling == "map":
            return layers.AttentionPooling(
                self.heads,
                self.mlp_dim,
                self.activation,
                self.norm_eps,
                self.dtype,
                name="pooling",
            )(x, lengths)
        raise ValueError(f"unknown pooling {self.pooling!r} (known: {', '.join(POOLINGS)})")

    def flops(self) -> float:
        """Forward FLOPs of one text of `context_length` tokens (see `layers.transformer_flops`)."""
        n = self.context_length
        flops = layers.transformer_flops(self.depth, n, self.width, self.mlp_dim)
        if self.pooling == "map":
            flops += layers.attention_pooling_flops(n, self.width, self.mlp_dim)
        return flops


def make_text(
    variant: str,
    vocab_size: int,
    context_length: int,
    *,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    heads: int | None = None,
    causal: bool = True,
    pooling: str = "eos",
    eos_id: int = 1,
    pad_id: int = 0,
    padding_mask: bool = False,
    qk_norm: bool = False,
    layer_scale: float | None = None,
    stochastic_depth: float = 0.0,
    activation: str = "gelu_tanh",
    norm_eps: float = 1e-6,
    attention: str = "xla",
    quantization: str = "none",
    scan_layers: bool = True,
    remat: str = "none",
    dtype: Any = jnp.float32,
) -> TextTransformer:
    """A `TextTransformer` of a named size: `make_text("B", 32_000, 64, pooling="last")`.

    `width`, `depth`, `mlp_dim` and `heads` replace the variant's where not None. All others are the
    fields of `TextTransformer`.

    Raises:
      ValueError: unknown variant or pooling.
    """
    fields = {name: value for name, value in locals().items() if name not in MAKE_ONLY}
    size = variants.size_of(variant, width=width, depth=depth, mlp_dim=mlp_dim, heads=heads)
    check_choice("text pooling", pooling, POOLINGS)
    return TextTransformer(
        width=size.width, depth=size.depth, mlp_dim=size.mlp_dim, heads=size.heads, **fields
    )


# Arguments of `make_text` that are not handed on as they are.
MAKE_ONLY = {"variant", "width", "depth", "mlp_dim", "heads"}

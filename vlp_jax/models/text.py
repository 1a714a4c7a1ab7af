"""Text Transformer: causal (CLIP), bidirectional (SigLIP), or with a padding mask (BERT)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.dense import named
from vlp_jax.models.values import (
    PLAIN,
    ComputeConfig,
    TransformerConfig,
    check_choice,
    keywords_of,
    make_tower,
)

POOLINGS = ("eos", "argmax", "first", "last", "mean", "map", "none")


class TokenEmbedding(nn.Module):
    """Looks up a row of a learned table for each token id."""

    vocab_size: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, tokens: Int[Array, "batch tokens"]) -> Float[Array, "batch tokens width"]:
        table = self.param(
            "embedding",
            named(nn.initializers.normal(0.02), "vocab", "embed"),
            (self.vocab_size, self.width),
        )
        return layers.look_up(table, tokens, self.dtype)


class TextTransformer(nn.Module):
    """Encodes a text as one vector, or as one vector for each token.

    Attributes:
      vocab_size: number of token ids.
      context_length: length of a sequence, padding included.
      causal: a token sees itself and earlier tokens only (Radford et al. 2021, CLIP).
      pooling: "eos" (the first `eos_id`), "argmax" (the highest token id, which is the end of text
        in CLIP's vocabulary), "first", "last", "mean" (over tokens that are not `pad_id`), "map"
        (`AttentionPooling` over all tokens that the mask allows) or "none" (returns all tokens,
        also of the padding).
      padding_mask: hides everything after the last token that is not `pad_id` (Devlin et al. 2019,
        BERT).
      eos_id, pad_id: ids of the tokenizer.
    """

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    causal: bool = True
    pooling: str = "eos"
    eos_id: int = 1
    pad_id: int = 0
    padding_mask: bool = False
    compute: ComputeConfig = ComputeConfig()

    # For `shared_forward`, see `VisionTransformer.SHARED`.
    SHARED: ClassVar[Mapping[str, tuple[str, ...]]] = {"__call__": (), "_sequence": ("pooling",)}

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.transformer.width

    def example(self) -> tuple[Int[Array, "1 tokens"]]:
        """Returns the arguments of a call, for one text of zeros."""
        return (jnp.zeros((1, self.context_length), jnp.int32),)

    @nn.compact
    def __call__(
        self, tokens: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch width"] | Float[Array, "batch tokens width"]:
        """Returns the pooled features, in `compute.dtype`; ValueError for another length."""
        return self._pool(self._sequence(tokens, train), tokens)

    def _sequence(
        self, tokens: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch tokens width"]:
        """Returns all tokens before the pooling."""
        if tokens.shape[1] != self.context_length:
            raise ValueError(f"the model takes {self.context_length} tokens, not {tokens.shape[1]}")
        embedding = TokenEmbedding(
            self.vocab_size, self.width, self.compute.dtype, name="token_embedding"
        )
        x = embedding(tokens)
        # 0.01 as in OpenAI's CLIP, `initialize_parameters`.
        positions = layers.position_embedding(self, self.context_length, self.width, 0.01)
        x = x + positions.astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        encoder = layers.Encoder(self.transformer, self.compute, name="encoder")
        lengths = self.lengths(tokens) if self.padding_mask else None
        return encoder(x, AttentionMask(self.causal, lengths=lengths), train)

    def lengths(self, tokens: Int[Array, "batch tokens"]) -> Int[Array, " batch"]:
        """Counts the tokens up to the last one that is no padding; at least 1, for attention."""
        # Not a count of the tokens that differ: an id that also pads may occur within a text.
        last = jnp.max(jnp.where(tokens != self.pad_id, jnp.arange(tokens.shape[1]), 0), axis=1)
        return (last + 1).astype(jnp.int32)

    def _pool(
        self, x: Float[Array, "batch tokens width"], tokens: Int[Array, "batch tokens"]
    ) -> Float[Array, "batch *tokens width"]:
        if self.pooling == "none":
            return x
        if self.pooling in ("eos", "argmax"):
            marks = tokens == self.eos_id if self.pooling == "eos" else tokens
            position = jnp.argmax(marks, axis=1)  # the first of equal values
            return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]
        if self.pooling == "first":
            return x[:, 0]
        if self.pooling == "last":
            return x[:, -1]
        if self.pooling == "mean":
            weight = (tokens != self.pad_id).astype(jnp.float32)[..., None]
            # The weights are float32, and so is the sum; a text of padding alone has the mean 0.
            mean = (x * weight).sum(axis=1) / jnp.maximum(weight.sum(axis=1), 1)
            return mean.astype(x.dtype)
        if self.pooling == "map":
            pooling = layers.AttentionPooling(self.transformer, self.compute, name="pooling")
            lengths = self.lengths(tokens) if self.padding_mask else None
            return pooling(x, AttentionMask(lengths=lengths))
        raise ValueError(f"unknown pooling {self.pooling!r} (known: {', '.join(POOLINGS)})")


@keywords_of(TextTransformer, TransformerConfig, optional=True)
def make_text(
    variant: str | None = None, *, compute: ComputeConfig = PLAIN, **fields: Any
) -> TextTransformer:
    """Makes a `TextTransformer` of a named size: `make_text("B", pooling="last", ...)`.

    Args:
      variant: a name in `values.VARIANTS`; None where `width`, `depth`, `mlp_dim` and `heads`
        are given.
      fields: of `TextTransformer`, and of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: an unknown variant or pooling, or sizes that do not fit each other.
    """
    text = make_tower(TextTransformer, compute, variant, **fields)
    check_choice("text pooling", text.pooling, POOLINGS)
    return text

"""The parts of CoCa (see `vlp_jax.models.coca`) that other models do not have."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlp_jax.models import layers, variants
from vlp_jax.models.attention_mask import SEE_ALL, AttentionMask
from vlp_jax.models.decoder import CAUSAL
from vlp_jax.models.dense import Dense
from vlp_jax.models.heads import Cache, KeysAndValues, MultiHeadAttention
from vlp_jax.models.layers import Attended
from vlp_jax.models.parameters import named, norm
from vlp_jax.models.text import TokenEmbedding
from vlp_jax.models.values import (
    PLAIN,
    ComputeConfig,
    TransformerConfig,
    keywords_of,
    split_fields,
)

Seen = Float[Array, "batch queries embed"]
Words = Float[Array, "batch tokens width"]

# Epsilon of the norms of queries and tokens: open_clip does not give them the tower's.
INNER_EPS = 1e-5


class AttentionalPooler(nn.Module):
    """Learned queries attend to all tokens; queries, tokens and results are normalized.

    Attributes:
      queries: how many there are.
      transformer: the width and heads of the queries, and the norm of the results; its depth and
        `mlp_dim` are not looked at.
    """

    queries: int
    transformer: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    SHARED: ClassVar[Mapping[str, tuple[str, ...]]] = {"__call__": ()}

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"]) -> Seen:
        """Returns the result of each query."""
        config, dtype = self.transformer, self.compute.dtype
        inner = dataclasses.replace(config, norm_eps=INNER_EPS)
        init = named(nn.initializers.normal(1.0), None, "embed")
        query = self.param("query", init, (self.queries, config.width))
        query = norm(inner, dtype, "norm_query")(query)
        query = jnp.broadcast_to(query, (len(tokens), *query.shape))
        tokens = norm(inner, dtype, "norm_tokens")(tokens)
        x = MultiHeadAttention(config, self.compute, name="attention")(query, tokens)
        return norm(config, dtype, "norm")(x)


class CrossBlock(layers.Block):
    """A pre-norm layer that attends to other tokens alone, which are normalized as well."""

    @nn.compact
    def __call__(
        self,
        x: Words,
        context: Attended,
        drop_rate: Float[Array, ""] | None = None,
        kept: KeysAndValues | None = None,
        keep: bool = False,
    ) -> tuple[Words, KeysAndValues | None]:
        """Returns what comes out, and with `keep` the keys and values of the other tokens.

        Args:
          context: the other tokens.
          drop_rate: see `Block`.
          kept: keys and values that an earlier call gave; `context` is not looked at then.
        """
        tokens = norm(self.config, self.compute.dtype, "norm_context")(context.tokens)
        x, seen = self._attend(
            x, tokens, context.mask, "attention", kept, keep=keep, drop_rate=drop_rate
        )
        return self._feed(x, drop_rate), seen


class CoCaBlock(nn.Module):
    """A layer of the decoder: `Block` on the text, then `CrossBlock` on the image."""

    config: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        x: Words,
        drop_rate: Float[Array, ""] | None = None,
        mask: AttentionMask = SEE_ALL,
        context: Attended | None = None,
        cache: Cache | None = None,
    ) -> Words | tuple[Words, Cache]:
        """Arguments are those of `Block`; there must be a context."""
        read = layers.Block(self.config, self.compute, name="read")
        look = CrossBlock(self.config, self.compute, name="look")
        if cache is None:
            return look(read(x, drop_rate, mask), context, drop_rate)[0]
        x, after = read(x, drop_rate, mask, cache=Cache(cache.own, cache.filled))
        x, seen = look(x, context, drop_rate, cache.context, keep=True)
        return x, after.replace(context=seen)


class CoCaText(nn.Module):
    """Reads a text, at whose end a learned class token stands for all of it.

    Attributes:
      vocab_size: number of token ids.
      context_length: the most tokens of a text; there is a position more for the class token.
      transformer: the layers.
      bos_id, eos_id, pad_id: the tokenizer's; the first is that with which each text begins.
      compute: how the layers are computed.
    """

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    bos_id: int = 2
    eos_id: int = 1
    pad_id: int = 0
    compute: ComputeConfig = ComputeConfig()

    SHARED: ClassVar[Mapping[str, tuple[str, ...]]] = {"__call__": ()}

    def setup(self) -> None:
        config, width = self.transformer, self.width
        self.token_embedding = TokenEmbedding(self.vocab_size, width, self.compute.dtype)
        init = named(nn.initializers.normal(0.01), None, "embed")
        self.class_token = self.param("class_token", init, (1, width))
        rows = self.context_length + 1
        self.position_embedding = layers.position_embedding(self, rows, width, 0.01)
        self.encoder = layers.Encoder(config, self.compute, final_norm=False)
        self.norm = norm(config, self.compute.dtype, None)

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.transformer.width

    def example(self) -> tuple[Int[Array, "1 tokens"]]:
        """The tokens of one text, all 0."""
        return (jnp.zeros((1, self.context_length), jnp.int32),)

    def __call__(
        self, tokens: Int[Array, "batch tokens"], train: bool = False
    ) -> tuple[Float[Array, "batch width"], Words]:
        """Returns the normalized feature of each text and, not normalized, of each of its tokens.

        Args:
          train: whether stochastic depth is at work (it needs the random stream "drop_path").

        Raises:
          ValueError: the sequences are longer than `context_length`.
        """
        batch, count = tokens.shape
        last = self.class_token + self.position_embedding[count : count + 1]
        last = jnp.broadcast_to(last.astype(self.compute.dtype), (batch, *last.shape))
        x = jnp.concatenate([self._embed(tokens), last], axis=1)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        x = self.encoder(x, AttentionMask(causal=True, explicit=self._keys(tokens)), train)
        return self.norm(x[:, -1]), x[:, :-1]

    def step(self, tokens: Int[Array, "batch tokens"], cache: Cache) -> tuple[Words, Cache]:
        """Returns the features of tokens that follow those in a cache; none of them is padding."""
        mask = AttentionMask(causal=True, offset=cache.filled)
        return self.encoder(self._embed(tokens, cache.filled), mask, cache=cache)

    def _embed(self, tokens: Int[Array, "batch tokens"], first: Int[Array, ""] | int = 0) -> Words:
        if tokens.shape[1] > self.context_length:
            raise ValueError(
                f"the model takes at most {self.context_length} tokens, not {tokens.shape[1]}"
            )
        return layers.add_positions(self.token_embedding(tokens), self.position_embedding, first)

    def _keys(self, tokens: Int[Array, "batch tokens"]) -> Bool[Array, "batch 1 1 keys"]:
        """Returns which positions are seen.

        open_clip puts the True of the class token in front of the others, where its published
        weights were trained so: a position is hidden if the token before it is padding.
        """
        seen = jnp.pad(tokens != self.pad_id, ((0, 0), (1, 0)), constant_values=True)
        return seen[:, None, None, :]


class CoCaDecoder(nn.Module):
    """Scores the next token of a text that `CoCaText` has read, with a look at an image.

    Attributes:
      vocab_size: number of token ids that it scores.
      context_length: the most tokens of a text.
      transformer: the sizes of the layers, of which each is two (`CoCaBlock`).
      compute: how the layers are computed.
    """

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        self.encoder = layers.Encoder(self.transformer, self.compute, block=CoCaBlock)
        self.scores = Dense(
            ("embed", "vocab"),
            ("vocab",),
            self.compute.unquantized(),
            nn.initializers.normal(self.transformer.width**-0.5),
            use_bias=False,
            features=self.vocab_size,
        )

    def features(
        self, words: Words, seen: Seen, mask: AttentionMask = CAUSAL, train: bool = False
    ) -> Words:
        """Returns the last layer's output, from which `score` makes the scores."""
        return self.encoder(words, mask, train, Attended(seen))

    def score(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Returns the scores of the next token, float32."""
        return self.scores(features).astype(jnp.float32)

    def step(self, words: Words, cache: Cache, seen: Seen) -> tuple[Words, Cache]:
        """Returns the features of words that follow those in a cache, and the cache."""
        mask = AttentionMask(causal=True, offset=cache.filled)
        return self.encoder(words, mask, context=Attended(seen), cache=cache)


@keywords_of(CoCaText, TransformerConfig, optional=True)
def make_coca_text(
    variant: str | None = None,
    *,
    vocab_size: int,
    context_length: int,
    compute: ComputeConfig = PLAIN,
    **fields: Any,
) -> CoCaText:
    """Returns a `CoCaText` of a named size; see `make_coca_decoder`."""
    own, layer_fields = split_fields(fields)
    sizes = variants.size_of(variant, **layer_fields)
    return CoCaText(vocab_size, context_length, sizes, compute=compute, **own)


@keywords_of(TransformerConfig, optional=True)
def make_coca_decoder(
    variant: str | None = None,
    *,
    vocab_size: int,
    context_length: int,
    compute: ComputeConfig = PLAIN,
    **fields: Any,
) -> CoCaDecoder:
    """Returns a `CoCaDecoder` of a named size.

    Args:
      variant: a name in `variants.VARIANTS`; None where `width`, `depth`, `mlp_dim` and `heads`
        are given.
      fields: of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit each other.
    """
    sizes = variants.size_of(variant, **fields)
    return CoCaDecoder(vocab_size, context_length, sizes, compute=compute)

"""The modules of CoCa (see `vlp_jax.models.coca`) that no other model uses."""

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
from vlp_jax.models.values import PLAIN, ComputeConfig, TransformerConfig, keywords_of, split_fields

Seen = Float[Array, "batch queries embed"]
Words = Float[Array, "batch tokens width"]

# Epsilon of the norms of queries and tokens: open_clip leaves PyTorch's default there.
INNER_EPS = 1e-5


class AttentionalPooler(nn.Module):
    """Learned queries attend to all tokens; queries, tokens and results are normalized.

    Attributes:
      queries: the number of queries.
      transformer: width and heads of the queries, and the norm of the results; `depth` and
        `mlp_dim` are ignored.
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
        # open_clip draws the queries by torch.randn.
        init = named(nn.initializers.normal(1.0), None, "embed")
        query = self.param("query", init, (self.queries, config.width))
        query = norm(inner, dtype, "norm_query")(query)
        query = jnp.broadcast_to(query, (len(tokens), *query.shape))
        tokens = norm(inner, dtype, "norm_tokens")(tokens)
        x = MultiHeadAttention(config, self.compute, name="attention")(query, tokens)
        return norm(config, dtype, "norm")(x)


class CrossBlock(layers.Block):
    """A pre-norm layer with cross-attention only, which normalizes the other tokens as well."""

    @nn.compact
    def __call__(
        self,
        x: Words,
        context: Attended,
        drop_rate: Float[Array, ""] | None = None,
        kept: KeysAndValues | None = None,
        keep: bool = False,
    ) -> tuple[Words, KeysAndValues | None]:
        """Returns the output, and with `keep` the keys and values of `context`, else None.

        Args:
          context: the tokens to attend to.
          drop_rate: see `Block`.
          kept: keys and values from an earlier call; `context` is then ignored.
        """
        tokens = norm(self.config, self.compute.dtype, "norm_context")(context.tokens)
        x, seen = self._attend(
            x, tokens, context.mask, "attention", kept, keep=keep, drop_rate=drop_rate
        )
        return self._feed(x, drop_rate), seen


class CoCaBlock(nn.Module):
    """A layer of the decoder: a `Block` for the text, then a `CrossBlock` for the image."""

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
        """Takes the arguments of `Block`; `context` is required."""
        read = layers.Block(self.config, self.compute, name="read")
        look = CrossBlock(self.config, self.compute, name="look")
        if cache is None:
            return look(read(x, drop_rate, mask), context, drop_rate)[0]
        x, after = read(x, drop_rate, mask, cache=Cache(cache.own, cache.filled))
        x, seen = look(x, context, drop_rate, cache.context, keep=True)
        return x, after.replace(context=seen)


class CoCaText(nn.Module):
    """A causal text tower. A learned class token at the end of the text summarizes it.

    Attributes:
      vocab_size: number of token ids.
      context_length: largest number of tokens of a text. There is one more position, for the class
        token.
      transformer: the layers.
      bos_id, eos_id, pad_id: ids of the tokenizer; each text begins with `bos_id`.
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
        # 0.01 as in open_clip, `TextTransformer.init_parameters`; so are the positions below.
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
        """Returns the arguments of a call, for one text of zeros."""
        return (jnp.zeros((1, self.context_length), jnp.int32),)

    def __call__(
        self, tokens: Int[Array, "batch tokens"], train: bool = False
    ) -> tuple[Float[Array, "batch width"], Words]:
        """Returns the normalized features of each text, and its tokens' features without norm.

        Args:
          train: whether to apply stochastic depth, which needs the random stream "drop_path".

        Raises:
          ValueError: the sequences are longer than `context_length`.
        """
        batch, count = tokens.shape
        # The class token comes last: in causal attention it alone sees the whole text.
        last = self.class_token + self.position_embedding[count : count + 1]
        last = jnp.broadcast_to(last.astype(self.compute.dtype), (batch, *last.shape))
        x = jnp.concatenate([self._embed(tokens), last], axis=1)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        x = self.encoder(x, AttentionMask(causal=True, explicit=self._keys(tokens)), train)
        return self.norm(x[:, -1]), x[:, :-1]

    def step(self, tokens: Int[Array, "batch tokens"], cache: Cache) -> tuple[Words, Cache]:
        """Appends tokens (no padding) to a cache; returns their features and the new cache."""
        mask = AttentionMask(causal=True, offset=cache.filled)
        return self.encoder(self._embed(tokens, cache.filled), mask, cache=cache)

    def _embed(self, tokens: Int[Array, "batch tokens"], first: Int[Array, ""] | int = 0) -> Words:
        if tokens.shape[1] > self.context_length:
            raise ValueError(
                f"the model takes at most {self.context_length} tokens, not {tokens.shape[1]}"
            )
        return layers.add_positions(self.token_embedding(tokens), self.position_embedding, first)

    def _keys(self, tokens: Int[Array, "batch tokens"]) -> Bool[Array, "batch 1 1 keys"]:
        """Returns which positions attention may see.

        open_clip puts the True of the class token in front of the mask, although the token comes
        last. So a position is hidden if the token before it is padding. Its published weights were
        trained this way.
        """
        seen = jnp.pad(tokens != self.pad_id, ((0, 0), (1, 0)), constant_values=True)
        return seen[:, None, None, :]


class CoCaDecoder(nn.Module):
    """Scores the next token from the features of `CoCaText` and from an image.

    Attributes:
      vocab_size: number of token ids that it scores.
      context_length: largest number of tokens of a text.
      transformer: the sizes of the layers. Each layer is a pair (`CoCaBlock`).
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
        """Returns the last layer's output, the input of `score`."""
        return self.encoder(words, mask, train, Attended(seen))

    def score(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Returns the scores of the next token, float32."""
        return self.scores(features).astype(jnp.float32)

    def step(self, words: Words, cache: Cache, seen: Seen) -> tuple[Words, Cache]:
        """Appends words to a cache; returns their features and the new cache."""
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
    """Makes a `CoCaText` of a named size; see `make_coca_decoder`."""
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
    """Makes a `CoCaDecoder` of a named size.

    Args:
      variant: a name in `variants.VARIANTS`; None where `width`, `depth`, `mlp_dim` and `heads`
        are given.
      fields: of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit each other.
    """
    sizes = variants.size_of(variant, **fields)
    return CoCaDecoder(vocab_size, context_length, sizes, compute=compute)

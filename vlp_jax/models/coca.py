"""CoCa (Yu et al. 2022, arXiv:2205.01917) as open_clip implements it.

One model embeds images and texts and scores captions. The text tower reads a text without the
image. A decoder on top of it attends to the image and scores the next token.

Source: open_clip 3.3, coca_model.py and transformer.py. One pooler serves both losses: its first
query is the image's embedding, and the decoder attends to the other queries. The paper has two
poolers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.attention import SEE_ALL, AttentionMask
from vlp_jax.models.decoder import CAUSAL, empty_cache
from vlp_jax.models.dense import Dense, named, norm
from vlp_jax.models.dual_encoder import PairModel, l2_normalize
from vlp_jax.models.heads import Cache, KeysAndValues, MultiHeadAttention
from vlp_jax.models.layers import Attended
from vlp_jax.models.text import TokenEmbedding
from vlp_jax.models.values import (
    PLAIN,
    ComputeConfig,
    Images,
    Pixels,
    TransformerConfig,
    keywords_of,
    make_tower,
)
from vlp_jax.models.vit import VisionTransformer

Seen = Float[Array, "batch queries embed"]
Words = Float[Array, "batch tokens width"]

# Epsilon of the norms of queries and tokens: open_clip leaves PyTorch's default there.
INNER_EPS = 1e-5


class AttentionalPooler(nn.Module):
    """Learned queries attend to all tokens; queries, tokens and results are normalized.

    `transformer` has the width and heads of the queries, and the norm of the results; its `depth`
    and `mlp_dim` are ignored.
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

        `kept` are keys and values from an earlier call; `context` is then ignored.
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
      context_length: largest number of tokens of a text, without the class token.
      bos_id, eos_id, pad_id: ids of the tokenizer; each text begins with `bos_id`.
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
        """Returns each text's normalized features, and its tokens' features without norm."""
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
    """Scores the next token from the features of `CoCaText` and an image, by layers `CoCaBlock`."""

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
    variant: str | None = None, *, compute: ComputeConfig = PLAIN, **fields: Any
) -> CoCaText:
    """Makes a `CoCaText` of a named size; see `make_coca_decoder`."""
    return make_tower(CoCaText, compute, variant, **fields)


@keywords_of(CoCaDecoder, TransformerConfig, optional=True)
def make_coca_decoder(
    variant: str | None = None, *, compute: ComputeConfig = PLAIN, **fields: Any
) -> CoCaDecoder:
    """Makes a `CoCaDecoder` of a named size.

    Args:
      variant: a name in `values.VARIANTS`; None where `width`, `depth`, `mlp_dim` and `heads`
        are given.
      fields: of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit each other.
    """
    return make_tower(CoCaDecoder, compute, variant, **fields)


class CoCa(PairModel):
    """An image tower, a text tower, and a decoder of captions on top of both.

    Attributes:
      image: the image tower, with pooling "none" and without its last norm.
      text, decoder: the text tower and the decoder; they have the same width.
      embed_dim: width of the shared embedding and of the queries.
      logit_scale_init, logit_bias_init, pixels: see `DualEncoder`.
      queries: number of queries of the pooler: one for the embedding, the rest for the decoder.
      pooler_heads: attention heads of the pooler.
    """

    image: VisionTransformer
    text: CoCaText
    decoder: CoCaDecoder
    embed_dim: int
    logit_scale_init: float
    logit_bias_init: float | None = None
    queries: int = 256
    pooler_heads: int = 8
    pixels: Pixels = Pixels()

    IS: ClassVar[str] = "an image tower, a text tower and a decoder of captions"

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image, "text": self.text, "decoder": self.decoder}

    def setup(self) -> None:
        # The pooler takes kind and epsilon of its norms from the image tower, as open_clip does.
        config = dataclasses.replace(
            self.image.transformer, width=self.embed_dim, heads=self.pooler_heads, qk_norm=False
        )
        self.pooler = AttentionalPooler(self.queries, config, self.image.compute)
        self.image_projection = self.projection(self.embed_dim)
        self.text_projection = self.projection(self.text.width)
        self.make_logits()

    def __call__(
        self,
        image: Images,
        text: Int[Array, "batch tokens"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """Returns the result of `PairModel`. Each row of `text` begins with `bos_id`."""
        # The embeddings do not use the decoder, and Flax makes parameters only of what is called.
        if self.is_initializing():
            self.score(self.features(image, text))
        return super().__call__(image, text, keep, train)

    def embed_image(
        self, image: Images, keep: Int[Array, "batch kept"] | None = None, train: bool = False
    ) -> Float[Array, "batch embed"]:
        """Returns unit vectors of images, float32; `keep` restricts the tower to some patches."""
        return l2_normalize(self.image_projection(self._pooled(image, keep, train)[:, 0]))

    def embed_text(
        self, text: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch embed"]:
        """Returns unit vectors of token ids, float32."""
        return l2_normalize(self.text_projection(self.text(text, train)[0]))

    def image_features(self, image: Images) -> Float[Array, "batch embed"]:
        """Returns the pooled query before the projection, float32."""
        return self._pooled(image)[:, 0].astype(jnp.float32)

    def look(self, image: Images, train: bool = False) -> Seen:
        """Returns the queries that the decoder attends to."""
        return self._pooled(image, None, train)[:, 1:]

    def _pooled(
        self, image: Images, keep: Int[Array, "batch kept"] | None = None, train: bool = False
    ) -> Seen:
        """Returns the results of all queries. Both losses share them within `shared_forward`."""
        return self.pooler(self.image(image, keep, train, self.pixels.normalize))

    def features(
        self,
        image: Images,
        tokens: Int[Array, "batch tokens"],
        mask: AttentionMask = CAUSAL,
        train: bool = False,
    ) -> Words:
        """Returns the input of `score`; `mask` is the mask of the decoder alone."""
        words = self.text(tokens, train)[1]
        return self.decoder.features(words, self.look(image, train), mask, train)

    def score(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Returns the scores of the next token, float32."""
        return self.decoder.score(features)

    def score_tokens(
        self, tokens: Int[Array, "batch tokens"], seen: Seen
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns the scores of each next token, float32, for image queries from `look`."""
        return self.score(self.decoder.features(self.text(tokens)[1], seen))

    def start(self, batch: int, length: int) -> Cache:
        """Makes an empty cache of text tower and decoder, for texts of `length` tokens."""
        caches = [
            empty_cache(tower.transformer, tower.compute, batch, length)
            for tower in (self.text, self.decoder)
        ]
        # One count serves both towers; `own` is a pair of caches. The text tower has no context.
        return caches[0].replace(own=tuple(cache.own for cache in caches))

    def step(
        self, tokens: Int[Array, "batch tokens"], cache: Cache, seen: Seen
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Appends `tokens` (no padding) to the cache; returns the next scores and the new cache."""
        of_text, of_decoder = cache.own
        words, read = self.text.step(tokens, Cache(of_text, cache.filled))
        features, after = self.decoder.step(
            words, Cache(of_decoder, cache.filled, cache.context), seen
        )
        return self.score(features[:, -1]), after.replace(own=(read.own, after.own))


def check_coca(model: CoCa) -> None:
    """Raises ValueError if the towers of a model do not fit each other."""
    widths = model.text.width, model.decoder.transformer.width
    if widths[0] != widths[1]:
        raise ValueError(
            f"the decoder goes on with the text tower's tokens: give both one width, not "
            f"{widths[1]} and {widths[0]}"
        )
    if model.queries < 2:
        raise ValueError(f"queries must be at least 2, not {model.queries}: one is pooled alone")
    if model.pooler_heads < 1 or model.embed_dim % model.pooler_heads:
        raise ValueError(f"{model.pooler_heads} pooler_heads do not divide {model.embed_dim}")

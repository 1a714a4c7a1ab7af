"""A text decoder that scores each next token, and the captioner: an image tower with a decoder."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.dense import Dense, named
from vlp_jax.models.heads import Cache
from vlp_jax.models.layers import Attended
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

CAUSAL = AttentionMask(causal=True)


class Decoder(nn.Module):
    """A Transformer over token ids that scores the next one (Vaswani et al. 2017, 3.1).

    Attributes:
      vocab_size: number of token ids that it scores.
      context_length: largest number of tokens of a sequence.
      transformer: the layers; with `rope` there are no learned positions.
      extra_tokens: ids after the vocabulary that the input may contain and that are never scored,
        such as a mask token.
      tied: True scores by products with the token embeddings. False has a separate kernel, which
        starts at zero, and a bias (Tschannen et al. 2023, "CapPa", as in big_vision).
      embedding_stddev: initial standard deviation of the token embeddings.
    """

    vocab_size: int
    context_length: int
    transformer: TransformerConfig
    extra_tokens: int = 0
    tied: bool = False
    embedding_stddev: float = 0.02
    compute: ComputeConfig = ComputeConfig()

    def setup(self) -> None:
        width = self.transformer.width
        rows = self.vocab_size + self.extra_tokens
        init = nn.initializers.normal(self.embedding_stddev)
        self.token_embedding = self.param(
            "token_embedding", named(init, "vocab", "embed"), (rows, width)
        )
        if self.transformer.rope is None:
            self.position_embedding = layers.position_embedding(
                self, self.context_length, width, 0.02
            )
        self.encoder = layers.Encoder(self.transformer, self.compute)
        if not self.tied:
            self.scores = Dense(
                ("embed", "vocab"),
                ("vocab",),
                self.compute.unquantized(),
                # All tokens are equally likely at first.
                nn.initializers.zeros_init(),
                features=self.vocab_size,
            )

    def __call__(
        self,
        tokens: Int[Array, "batch tokens"],
        context: Attended | None = None,
        mask: AttentionMask = CAUSAL,
        train: bool = False,
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns the scores of each next token, float32.

        Args:
          context: other tokens to attend to; None for a language model.
          mask: the mask of the self-attention.
        """
        return self.score(self.features(tokens, context, mask, train))

    def features(
        self,
        tokens: Int[Array, "batch tokens"],
        context: Attended | None = None,
        mask: AttentionMask = CAUSAL,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Returns the last layer's output, the input of `score`; ValueError for long sequences."""
        return self.encoder(self._embed(tokens, 0), mask, train, context)

    def score(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Returns the scores of the next token, float32."""
        if not self.tied:
            return self.scores(features).astype(jnp.float32)
        # Extra tokens are inputs alone, so their rows score nothing.
        table = self.token_embedding[: self.vocab_size].astype(self.compute.dtype)
        return (features @ table.T).astype(jnp.float32)

    def start(self, batch: int, length: int) -> Cache:
        """Makes an empty cache for `length` tokens; ValueError if they exceed `context_length`."""
        self._check(length)
        return empty_cache(self.transformer, self.compute, batch, length)

    def step(
        self, tokens: Int[Array, "batch tokens"], cache: Cache, context: Attended | None = None
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Appends `tokens` to the cache; returns the next token's scores and the new cache.

        Pass `context` in every step. Its keys and values are computed in the first step and cached.
        """
        x = self._embed(tokens, cache.filled)
        mask = AttentionMask(causal=True, offset=cache.filled)
        x, cache = self.encoder(x, mask, context=context, cache=cache)
        return self.score(x[:, -1]), cache

    def _embed(
        self, tokens: Int[Array, "batch tokens"], first: Int[Array, ""] | int
    ) -> Float[Array, "batch tokens width"]:
        self._check(tokens.shape[1])
        x = layers.look_up(self.token_embedding, tokens, self.compute.dtype)
        if self.transformer.rope is None:
            x = layers.add_positions(x, self.position_embedding, first)
        return nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))

    def _check(self, length: int) -> None:
        if length > self.context_length:
            raise ValueError(
                f"the decoder takes at most {self.context_length} tokens, not {length}"
            )


def empty_cache(
    config: TransformerConfig, compute: ComputeConfig, batch: int, length: int
) -> Cache:
    """Makes an empty cache of an encoder's layers, with room for `length` tokens."""
    shape = (config.depth, batch, length, config.key_heads, config.head_width)
    if compute.attention == "pallas":  # this kernel takes heads side by side, see `attend_flat`
        shape = (*shape[:3], shape[3] * shape[4])
    empty = jnp.zeros(shape, compute.dtype)
    return Cache((empty, empty), jnp.int32(0))


@keywords_of(Decoder, TransformerConfig, optional=True)
def make_decoder(
    variant: str | None = None, *, compute: ComputeConfig = PLAIN, **fields: Any
) -> Decoder:
    """Makes a `Decoder` of a named size.

    Args:
      variant: a name in `values.VARIANTS`; None where `width`, `depth`, `mlp_dim` and `heads`
        are given.
      fields: of `Decoder`, and of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: an unknown variant, or sizes that do not fit each other.
    """
    return make_tower(Decoder, compute, variant, **fields)


Seen = Float[Array, "batch image_tokens image_embed"]


class Captioner(nn.Module):
    """Scores the tokens of a text about an image (Tschannen et al. 2023, "CapPa", 3.1).

    The image tower has no pooling: the decoder attends to all of its tokens.
    """

    image: VisionTransformer
    decoder: Decoder
    pixels: Pixels = Pixels()

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image, "decoder": self.decoder}

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, for one example of zeros."""
        tokens = jnp.zeros((1, self.decoder.context_length), jnp.int32)
        return (*self.image.example(jnp.uint8), tokens)

    def __call__(
        self, image: Images, tokens: Int[Array, "batch tokens"], mask: AttentionMask = CAUSAL
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns the scores of each next token, float32. Images have values in [0, 255]."""
        return self.decoder(tokens, Attended(self.look(image)), mask)

    def look(self, image: Images, train: bool = False) -> Seen:
        """Returns the image tokens that the decoder attends to. Images have values in [0, 255]."""
        return self.image(image, train=train, prepare=self.pixels.normalize)

    def features(
        self,
        image: Images,
        tokens: Int[Array, "batch tokens"],
        mask: AttentionMask,
        train: bool = False,
    ) -> Float[Array, "batch tokens width"]:
        """Returns the input of `score`; see `Decoder.features`."""
        return self.decoder.features(tokens, Attended(self.look(image, train)), mask, train)

    def score_tokens(
        self, tokens: Int[Array, "batch tokens"], seen: Seen
    ) -> Float[Array, "batch tokens vocab"]:
        """Returns the scores of each next token, float32, for image tokens from `look`."""
        return self.decoder(tokens, Attended(seen))

    def score(self, features: Float[Array, "*batch width"]) -> Float[Array, "*batch vocab"]:
        """Returns the scores of the next token, float32."""
        return self.decoder.score(features)

    def start(self, batch: int, length: int) -> Cache:
        """Makes an empty cache for texts of `length` tokens."""
        return self.decoder.start(batch, length)

    def step(
        self, tokens: Int[Array, "batch tokens"], cache: Cache, seen: Seen
    ) -> tuple[Float[Array, "batch vocab"], Cache]:
        """Appends `tokens` to the cache; returns the next token's scores and the new cache."""
        return self.decoder.step(tokens, cache, Attended(seen))

    def image_features(self, image: Images) -> Float[Array, "batch embed"]:
        """Returns the mean over the patches, float32, as CapPa's probes take it."""
        tokens = self.look(image)[:, self.image.prefix_tokens :]
        return tokens.astype(jnp.float32).mean(axis=1)

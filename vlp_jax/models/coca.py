"""CoCa (Yu et al. 2022, arXiv:2205.01917) as open_clip implements it.

One model embeds images and texts and scores captions. The text tower reads a text without the
image. A decoder on top of it attends to the image and scores the next token.

Source: open_clip 3.3, coca_model.py and transformer.py. One pooler serves both losses: its first
query is the image's embedding, and the decoder attends to the other queries. The paper has two
poolers.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention_mask import AttentionMask
from vlp_jax.models.coca_towers import AttentionalPooler, CoCaDecoder, CoCaText, Seen, Words
from vlp_jax.models.decoder import CAUSAL, empty_cache
from vlp_jax.models.dense import Dense
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.heads import Cache
from vlp_jax.models.values import Images, Pixels
from vlp_jax.models.vit import VisionTransformer


class CoCa(nn.Module):
    """An image tower, a text tower, and a decoder of captions on top of both.

    Attributes:
      image: the image tower, with pooling "none" and without its last norm.
      text, decoder: the text tower and the decoder; they have the same width.
      embed_dim: width of the shared embedding and of the queries.
      logit_scale_init: initial natural logarithm of the factor on the cosine similarity.
      logit_bias_init: initial bias of the logits; None for no bias.
      queries: number of queries of the pooler: one for the embedding, the rest for the decoder.
      pooler_heads: attention heads of the pooler.
      pixels: normalization of the pixels.
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

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, for one example of zeros."""
        return (*self.image.example(jnp.uint8), *self.text.example())

    def setup(self) -> None:
        # The pooler takes kind and epsilon of its norms from the image tower, as open_clip does.
        config = dataclasses.replace(
            self.image.transformer, width=self.embed_dim, heads=self.pooler_heads, qk_norm=False
        )
        self.pooler = AttentionalPooler(self.queries, config, self.image.compute)
        self.image_projection = self._projection(self.embed_dim)
        self.text_projection = self._projection(self.text.width)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(self.logit_scale_init), (), jnp.float32
        )
        if self.logit_bias_init is not None:
            self.logit_bias = self.param(
                "logit_bias", nn.initializers.constant(self.logit_bias_init), (), jnp.float32
            )

    def _projection(self, width: int) -> Dense:
        return Dense(
            ("embed", "projection"),
            ("projection",),
            self.image.compute.unquantized(),
            nn.initializers.normal(width**-0.5),
            use_bias=False,
            features=self.embed_dim,
        )

    def __call__(
        self,
        image: Images,
        text: Int[Array, "batch tokens"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """Returns both embeddings, `logit_scale` (still a logarithm) and `logit_bias` (0 if none).

        Args:
          image: values in [0, 255].
          text: ids that begin with `bos_id`.
          keep: indices of the patches that the tower sees, for each image; None for all.
          train: whether to apply stochastic depth, which needs the random stream "drop_path".
        """
        # The embeddings do not use the decoder, and Flax makes parameters only of what is called.
        if self.is_initializing():
            self.score(self.features(image, text))
        scale, bias = self.logit_parameters()
        return {
            "image": self.embed_image(image, keep, train),
            "text": self.embed_text(text, train),
            "logit_scale": scale,
            "logit_bias": bias,
        }

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

    def logit_parameters(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns `logit_scale` (still a logarithm) and `logit_bias` (0 if none)."""
        bias = jnp.float32(0) if self.logit_bias_init is None else self.logit_bias
        return self.logit_scale, bias

    def look(self, image: Images, train: bool = False) -> Seen:
        """Returns the queries that the decoder attends to. Images have values in [0, 255]."""
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
        """Returns the input of `score` for each next token.

        Args:
          mask: the mask of the decoder's self-attention. The text tower is always causal.
        """
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
        """Appends `tokens` to the cache; returns the next token's scores and the new cache.

        The tokens must not be padding, since no entry of the cache is masked.
        """
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

"""An image tower, and a text decoder that attends to its tokens."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models.attention_mask import AttentionMask
from vlp_jax.models.decoder import CAUSAL, Decoder
from vlp_jax.models.heads import Cache
from vlp_jax.models.layers import Attended
from vlp_jax.models.values import Images, Pixels
from vlp_jax.models.vit import VisionTransformer

Seen = Float[Array, "batch image_tokens image_width"]


class Captioner(nn.Module):
    """Scores the tokens of a text about an image (Tschannen et al. 2023, "CapPa", 3.1).

    Attributes:
      image: the tower, without pooling: the decoder attends to all of its tokens.
      decoder: reads and scores the text.
      pixels: normalization of the pixels.
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

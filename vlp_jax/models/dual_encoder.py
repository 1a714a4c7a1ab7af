"""Two towers that end in one embedding space (Radford et al. 2021; Zhai et al. 2023)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.models import layers
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.vit import VisionTransformer


def normalize_pixels(
    image: UInt8[Array, "batch height width 3"],
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> Float[Array, "batch height width 3"]:
    """uint8 pixels to (x / 255 - mean) / std, in float32."""
    scaled = image.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean, jnp.float32)) / jnp.asarray(std, jnp.float32)


def l2_normalize(x: Float[Array, "*batch dim"], eps: float = 1e-12) -> Float[Array, "*batch dim"]:
    """x / max(|x|, eps) along the last dimension, in float32."""
    x = x.astype(jnp.float32)
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))


class DualEncoder(nn.Module):
    """Image and text encoder, each with a linear projection to `embed_dim`, and the logits' scale.

    Attributes:
      image, text: the towers.
      embed_dim: width of the shared embedding.
      logit_scale_init: initial natural logarithm of the factor on the cosine similarity.
      logit_bias_init: initial bias of the logits, None for none (it belongs to the sigmoid loss).
      image_mean, image_std: of the pixels, scaled to [0, 1], a value per channel.
    """

    image: VisionTransformer
    text: TextTransformer
    embed_dim: int
    logit_scale_init: float
    logit_bias_init: float | None = None
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def setup(self) -> None:
        def projection(width: int) -> nn.Dense:
            return nn.Dense(
                self.embed_dim,
                use_bias=False,
                dtype=self.image.dtype,
                kernel_init=layers.named(
                    nn.initializers.normal(width**-0.5), "embed", "projection"
                ),
            )

        self.image_projection = projection(self.image.width)
        self.text_projection = projection(self.text.width)
        self.logit_scale = self.param(
            "logit_scale", nn.initializers.constant(self.logit_scale_init), (), jnp.float32
        )
        if self.logit_bias_init is not None:
            self.logit_bias = self.param(
                "logit_bias", nn.initializers.constant(self.logit_bias_init), (), jnp.float32
            )

    def embed_image(
        self, image: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """Unit vectors of uint8 images, float32."""
        pixels = normalize_pixels(image, self.image_mean, self.image_std)
        return l2_normalize(self.image_projection(self.image(pixels)))

    def embed_text(self, text: Int[Array, "batch tokens"]) -> Float[Array, "batch embed"]:
        """Unit vectors of token ids, float32."""
        return l2_normalize(self.text_projection(self.text(text)))

    def __call__(
        self, image: UInt8[Array, "batch height width 3"], text: Int[Array, "batch tokens"]
    ) -> dict[str, Any]:
        """Both embeddings, `logit_scale` (still a logarithm) and `logit_bias` (0 if none)."""
        bias = jnp.float32(0) if self.logit_bias_init is None else self.logit_bias
        return {
            "image": self.embed_image(image),
            "text": self.embed_text(text),
            "logit_scale": self.logit_scale,
            "logit_bias": bias,
        }

    def flops(self) -> float:
        """Forward FLOPs of one image-text pair, without the loss."""
        projections = 2.0 * self.embed_dim * (self.image.width + self.text.width)
        return self.image.flops() + self.text.flops() + projections

"""Masked autoencoder (He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners")."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.models import layers
from vlp_jax.models.dual_encoder import normalize_pixels, pixel_normalizer
from vlp_jax.models.masking import PatchMask, take_tokens
from vlp_jax.models.positions import Grid, sincos_2d
from vlp_jax.models.vit import VisionTransformer, patchify


class MaskedDecoder(nn.Module):
    """From the visible tokens to the pixels of all patches.

    Attributes:
      grid: rows and columns of patches.
      class_token: whether the first token it gets is a class token.
      outputs: numbers that are predicted for a patch.
      position: "sincos" (fixed, as published) or "learned", a table with a row for the class token.
    """

    grid: Grid
    class_token: bool
    outputs: int
    width: int
    depth: int
    mlp_dim: int
    heads: int
    position: str = "sincos"
    activation: str = "gelu"
    norm_eps: float = 1e-6
    attention: str = "xla"
    quantization: str = "none"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def patches(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch visible embed"], restore: Int[Array, "batch patches"]
    ) -> Float[Array, "batch patches outputs"]:
        """
        Args:
          x: the encoder's tokens: the class token if any, then the visible patches.
          restore: see `masking.PatchMask`.
        """
        x = self._dense(self.width, "embedding", "embed", None)(x)
        init = layers.named(nn.initializers.normal(0.02), None, "embed")
        mask_token = self.param("mask_token", init, (1, self.width)).astype(x.dtype)
        prefix, visible = x[:, : int(self.class_token)], x[:, int(self.class_token) :]
        hidden = self.patches - visible.shape[1]
        filler = jnp.broadcast_to(mask_token, (x.shape[0], hidden, self.width))
        patches = take_tokens(jnp.concatenate([visible, filler], axis=1), restore)
        x = jnp.concatenate([prefix, patches], axis=1) + self._positions().astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        x = layers.Encoder(
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            attention=self.attention,
            quantization=self.quantization,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            name="encoder",
        )(x)
        return self._dense(self.outputs, "prediction", "embed", None)(x[:, int(self.class_token) :])

    def _dense(self, features: int, name: str, *axes: str | None) -> nn.Dense:
        return nn.Dense(
            features,
            dtype=self.dtype,
            name=name,
            kernel_init=layers.named(nn.initializers.xavier_uniform(), *axes),
            bias_init=layers.named(nn.initializers.zeros_init(), "norm"),
        )

    def _positions(self) -> Float[Array, "tokens width"]:
        if self.position == "learned":
            return layers.position_embedding(
                self, self.class_token + self.patches, self.width, 0.02
            )
        table = jnp.asarray(sincos_2d(self.grid, self.width))
        return jnp.pad(table, ((int(self.class_token), 0), (0, 0)))

    def flops(self, visible: int) -> float:
        """Forward FLOPs of one image of which the encoder saw `visible` tokens, without its width's
        share in the first projection."""
        tokens = self.class_token + self.patches
        flops = layers.transformer_flops(self.depth, tokens, self.width, self.mlp_dim)
        return flops + 2.0 * self.patches * self.width * self.outputs


class MaskedAutoencoder(nn.Module):
    """An encoder that sees a part of the patches, a small decoder that paints the rest.

    Attributes:
      image: the encoder, without pooling.
      decoder: what paints.
      image_mean, image_std: of the pixels, scaled to [0, 1], a value per channel.
    """

    image: VisionTransformer
    decoder: MaskedDecoder
    image_mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    image_std: tuple[float, ...] = (0.229, 0.224, 0.225)

    def __call__(
        self,
        image: UInt8[Array, "batch height width 3"],
        mask: PatchMask,
        train: bool = False,
    ) -> Float[Array, "batch patches outputs"]:
        """The predicted numbers of every patch, float32, in the order (row, column, channel)."""
        latent = self.encode(image, mask.keep, train)
        return self.decode(latent, mask.restore)

    def encode(
        self,
        image: UInt8[Array, "batch height width 3"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens embed"]:
        """The encoder's tokens of uint8 images, of the patches `keep` alone if given."""
        normalize = pixel_normalizer(self.image_mean, self.image_std)
        return self.image(image, keep, train, normalize)

    def decode(
        self,
        latent: Float[Array, "batch tokens embed"],
        restore: Int[Array, "batch patches"],
    ) -> Float[Array, "batch patches outputs"]:
        """Predictions for all patches from the encoder's tokens; registers are left out."""
        first, second = int(self.image.class_token), self.image.prefix_tokens
        latent = jnp.concatenate([latent[:, :first], latent[:, second:]], axis=1)
        return self.decoder(latent, restore).astype(jnp.float32)

    def targets(
        self, image: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches outputs"]:
        """Normalized pixels of every patch, in the order of the predictions."""
        pixels = normalize_pixels(image, self.image_mean, self.image_std)
        patches = patchify(pixels, self.image.patch_size)
        return patches.reshape(*patches.shape[:2], -1)

    def features(self, image: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch embed"]:
        """The class token of whole images, or the mean over the patches if there is none."""
        latent = self.encode(image)
        return latent[:, 0] if self.image.class_token else latent.mean(axis=1)

    def flops(self, kept: int) -> float:
        """Forward FLOPs of one image with `kept` visible patches."""
        visible = self.image.class_token + kept
        embedding = 2.0 * visible * self.image.width * self.decoder.width
        return self.image.flops(kept) + embedding + self.decoder.flops(visible)

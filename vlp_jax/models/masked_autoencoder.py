"""Masked autoencoder: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"."""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.models import layers
from vlp_jax.models.dense import Dense, named
from vlp_jax.models.masking import PatchMask, mask_from_noise, take_tokens
from vlp_jax.models.positions import Grid, sincos_2d
from vlp_jax.models.values import (
    IMAGENET,
    PLAIN,
    ComputeConfig,
    Pixels,
    TransformerConfig,
    check_choice,
    keywords_of,
    make_tower,
)
from vlp_jax.models.vit import VisionTransformer, patchify


class MaskedDecoder(nn.Module):
    """Predicts the pixels of all patches from the encoder's tokens of the visible patches.

    Attributes:
      grid: rows and columns of patches.
      class_token: whether the encoder's first token is a class token.
      outputs: number of values to predict for a patch.
      position: "sincos" (fixed, as published) or "learned", a table with a row for the class token.
    """

    grid: Grid
    class_token: bool
    outputs: int
    transformer: TransformerConfig
    position: str = "sincos"
    compute: ComputeConfig = ComputeConfig()

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return self.grid[0] * self.grid[1]

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch visible embed"], restore: Int[Array, "batch patches"]
    ) -> Float[Array, "batch patches outputs"]:
        """Predicts the values of every patch, in row order.

        Args:
          x: the encoder's tokens: the class token if any, then the visible patches.
          restore: see `masking.PatchMask`.
        """
        width = self.transformer.width
        x = self._dense(width, "embedding")(x)
        # 0.02 as in facebookresearch/mae, models_mae.py.
        init = named(nn.initializers.normal(0.02), None, "embed")
        mask_token = self.param("mask_token", init, (1, width)).astype(x.dtype)
        prefix, visible = x[:, : int(self.class_token)], x[:, int(self.class_token) :]
        hidden = self.patches - visible.shape[1]
        # Visible patches, then mask tokens: the order that `restore` turns back into row order.
        filler = jnp.broadcast_to(mask_token, (x.shape[0], hidden, width))
        patches = take_tokens(jnp.concatenate([visible, filler], axis=1), restore)
        x = jnp.concatenate([prefix, patches], axis=1) + self._positions().astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        x = layers.Encoder(self.transformer, self.compute, name="encoder")(x)
        return self._dense(self.outputs, "prediction")(x[:, int(self.class_token) :])

    def _dense(self, features: int, name: str) -> Dense:
        compute = self.compute.unquantized()
        return Dense(("embed", None), ("norm",), compute, features=features, name=name)

    def _positions(self) -> Float[Array, "tokens width"]:
        if self.position == "learned":
            tokens = self.class_token + self.patches
            return layers.position_embedding(self, tokens, self.transformer.width, 0.02)
        # The class token has the position 0, as published (facebookresearch/mae, pos_embed.py).
        table = jnp.asarray(sincos_2d(self.grid, self.transformer.width))
        return jnp.pad(table, ((int(self.class_token), 0), (0, 0)))


@keywords_of(
    MaskedDecoder, TransformerConfig, without=("grid", "class_token", "outputs", "stochastic_depth")
)
def make_masked_decoder(
    image: VisionTransformer, *, compute: ComputeConfig = PLAIN, **fields: Any
) -> MaskedDecoder:
    """Makes the decoder for an encoder.

    Args:
      image: the encoder. The decoder takes over its activation and norm by default.
      fields: fields of `MaskedDecoder` and of `TransformerConfig`.

    Raises:
      ValueError: an unknown position, or sizes that do not fit each other.
    """
    layers = image.transformer
    like = {"activation": layers.activation, "norm": layers.norm, "norm_eps": layers.norm_eps}
    decoder = make_tower(
        MaskedDecoder,
        compute,
        grid=image.grid,
        class_token=image.class_token,
        outputs=3 * image.patch_size**2,
        **{**like, **fields},
    )
    check_choice("decoder.position", decoder.position, ("sincos", "learned"))
    return decoder


class MaskedAutoencoder(nn.Module):
    """An encoder of the visible patches, and a small decoder that predicts the hidden ones."""

    image: VisionTransformer
    decoder: MaskedDecoder
    pixels: Pixels = IMAGENET

    IS: ClassVar[str] = "an image tower and a decoder"  # in words, for errors

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image, "decoder": self.decoder}

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call: an image of zeros, the first half of its patches visible."""
        patches = self.image.patches
        noise = jnp.arange(patches, dtype=jnp.float32)[None]
        return (
            *self.image.example(jnp.uint8),
            mask_from_noise(noise, max(1, self.image.patches // 2)),
        )

    def __call__(
        self, image: UInt8[Array, "batch height width 3"], mask: PatchMask, train: bool = False
    ) -> Float[Array, "batch patches outputs"]:
        """Predicts the values of every patch, float32, in the order (row, column, channel)."""
        latent = self.encode(image, mask.keep, train)
        return self.decode(latent, mask.restore)

    def encode(
        self,
        image: UInt8[Array, "batch height width 3"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
    ) -> Float[Array, "batch tokens embed"]:
        """Returns the encoder's tokens for uint8 images; `keep` restricts it to some patches."""
        return self.image(image, keep, train, self.pixels.normalize)

    def decode(
        self, latent: Float[Array, "batch tokens embed"], restore: Int[Array, "batch patches"]
    ) -> Float[Array, "batch patches outputs"]:
        """Predicts all patches from the encoder's tokens; the decoder gets no registers."""
        # The encoder's order is class token, registers, patches.
        first, second = int(self.image.class_token), self.image.prefix_tokens
        latent = jnp.concatenate([latent[:, :first], latent[:, second:]], axis=1)
        return self.decoder(latent, restore).astype(jnp.float32)

    def targets(
        self, image: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch patches outputs"]:
        """Returns the normalized pixels of every patch, in the order of the predictions."""
        patches = patchify(self.pixels.normalize(image), self.image.patch_size)
        return patches.reshape(*patches.shape[:2], -1)

    def features(self, image: UInt8[Array, "batch height width 3"]) -> Float[Array, "batch embed"]:
        """Returns the class token of whole images, or without one the mean over all tokens."""
        latent = self.encode(image)
        return latent[:, 0] if self.image.class_token else latent.mean(axis=1)

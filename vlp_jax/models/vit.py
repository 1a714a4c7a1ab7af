"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

from __future__ import annotations

import math
from typing import Any

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models import layers, variants

POOLINGS = ("cls", "mean", "map")


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and projects each: a matrix product, no convolution.

    The kernel is `[patch, patch, channels, width]`, as that of the equivalent convolution (HWIO).
    """

    patch_size: int
    width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch tokens embed"]:
        p = self.patch_size
        height, width = image.shape[1:3]
        if height % p or width % p:
            raise ValueError(f"patches of {p} do not tile an image of {height} x {width} pixels")
        patches = einops.rearrange(image, "b (h p) (w q) c -> b (h w) p q c", p=p, q=p)
        fan_in = p * p * image.shape[-1]
        return nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.dtype,
            name="projection",
            kernel_init=layers.named(
                nn.initializers.truncated_normal(1 / math.sqrt(fan_in)),
                "patch_height",
                "patch_width",
                "channels",
                "embed",
            ),
            bias_init=layers.named(nn.initializers.zeros_init(), "norm"),
        )(patches)


class VisionTransformer(nn.Module):
    """Image to one vector: patches, positions, encoder, pooling.

    Attributes:
      image_size: height and width in pixels; a multiple of `patch_size`.
      pooling: "cls" (a class token), "mean" (over all tokens) or "map" (`AttentionPooling`).
    """

    image_size: int
    patch_size: int
    width: int
    depth: int
    mlp_dim: int
    heads: int
    pooling: str = "cls"
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    attention: str = "xla"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

    @property
    def tokens(self) -> int:
        """Length of the sequence in the encoder: the patches, and the class token if any."""
        return (self.image_size // self.patch_size) ** 2 + (self.pooling == "cls")

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch embed"]:
        """Normalized pixels to the pooled features, in `dtype`.

        Raises:
          ValueError: the image has another size than `image_size`.
        """
        if image.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"the model takes images of {self.image_size} pixels, not {image.shape[1:3]}"
            )
        x = PatchEmbedding(self.patch_size, self.width, self.dtype, name="patch_embedding")(
            image.astype(self.dtype)
        )
        if self.pooling == "cls":
            token = self.param(
                "class_token",
                layers.named(nn.initializers.normal(0.02), None, "embed"),
                (1, self.width),
            )
            token = jnp.broadcast_to(token.astype(x.dtype), (x.shape[0], 1, self.width))
            x = jnp.concatenate([token, x], axis=1)
        positions = layers.position_embedding(
            self, self.tokens, self.width, stddev=self.width**-0.5
        )
        x = x + positions.astype(x.dtype)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        x = layers.Encoder(
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            attention=self.attention,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            name="encoder",
        )(x)
        return self._pool(x)

    def _pool(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch width"]:
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "mean":
            return x.mean(axis=1)
        if self.pooling == "map":
            return layers.AttentionPooling(
                self.heads,
                self.mlp_dim,
                self.activation,
                self.norm_eps,
                self.dtype,
                name="pooling",
            )(x)
        raise ValueError(f"unknown pooling {self.pooling!r} (known: {', '.join(POOLINGS)})")

    def flops(self) -> float:
        """Forward FLOPs of one image (see `layers.transformer_flops`)."""
        patches = (self.image_size // self.patch_size) ** 2
        flops = 2.0 * patches * 3 * self.patch_size**2 * self.width
        flops += layers.transformer_flops(self.depth, self.tokens, self.width, self.mlp_dim)
        if self.pooling == "map":
            flops += layers.attention_pooling_flops(self.tokens, self.width, self.mlp_dim)
        return flops


def make_vit(
    variant: str,
    image_size: int,
    *,
    pooling: str = "cls",
    activation: str = "gelu_tanh",
    norm_eps: float = 1e-6,
    width: int | None = None,
    depth: int | None = None,
    mlp_dim: int | None = None,
    heads: int | None = None,
    attention: str = "xla",
    scan_layers: bool = True,
    remat: str = "none",
    dtype: Any = jnp.float32,
) -> VisionTransformer:
    """A `VisionTransformer` of a named size: `make_vit("B/16", 224, pooling="map")`.

    `width`, `depth`, `mlp_dim` and `heads` replace the variant's where not None.

    Raises:
      ValueError: unknown variant or pooling, or patches that do not tile the image.
    """
    name, patch_size = variants.split_variant(variant)
    size = variants.size_of(name, width=width, depth=depth, mlp_dim=mlp_dim, heads=heads)
    if image_size % patch_size:
        raise ValueError(f"patches of {patch_size} do not tile an image of {image_size} pixels")
    if pooling not in POOLINGS:
        raise ValueError(f"unknown image pooling {pooling!r} (known: {', '.join(POOLINGS)})")
    return VisionTransformer(
        image_size=image_size,
        patch_size=patch_size,
        width=size.width,
        depth=size.depth,
        mlp_dim=size.mlp_dim,
        heads=size.heads,
        pooling=pooling,
        activation=activation,
        norm_eps=norm_eps,
        attention=attention,
        scan_layers=scan_layers,
        remat=remat,
        dtype=dtype,
    )

"""Vision Transformer (Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words")."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import einops
import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

from vlp_jax.models import layers
from vlp_jax.models.dense import Product, named, norm
from vlp_jax.models.masking import take_tokens
from vlp_jax.models.positions import Grid, sincos_2d
from vlp_jax.models.values import (
    PLAIN,
    ComputeConfig,
    TransformerConfig,
    check_choice,
    keywords_of,
    make_tower,
    split_variant,
)

# Converts stored pixels [..., channels] to normalized ones. Must treat each pixel by itself.
Prepare = Callable[[Array], Array]

POOLINGS = ("cls", "mean", "map", "none")
POSITIONS = ("learned", "sincos", "none")


def patchify(
    image: Num[Array, "batch height width channels"], patch_size: int
) -> Num[Array, "batch patches patch_height patch_width channels"]:
    """Cuts images into patches, row by row; ValueError if they do not tile the image."""
    height, width = image.shape[1:3]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"patches of {patch_size} do not tile an image of {height} x {width} pixels"
        )
    return einops.rearrange(image, "b (h p) (w q) c -> b (h w) p q c", p=patch_size, q=patch_size)


def unpatchify(
    patches: Num[Array, "batch patches patch_height patch_width channels"], grid: Grid
) -> Num[Array, "batch height width channels"]:
    """Joins patches to images: undoes `patchify`."""
    return einops.rearrange(patches, "b (h w) p q c -> b (h p) (w q) c", h=grid[0], w=grid[1])


class PatchProjection(Product):
    """Projects each patch; the kernel is a convolution's: [height, width, channels, embed]."""

    width: int = 1

    @nn.compact
    def __call__(
        self, patches: Num[Array, "batch patches patch_height patch_width channels"]
    ) -> Float[Array, "batch patches embed"]:
        shape = patches.shape[2:]
        flat = patches.reshape(*patches.shape[:2], math.prod(shape))
        return self.product(flat, (*shape, self.width), (self.width,))


class PatchEmbedding(nn.Module):
    """Cuts an image into patches and projects each by a matrix product."""

    patch_size: int
    width: int
    use_bias: bool = True
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "batch height width channels"],
        keep: Int[Array, "batch kept"] | None = None,
        prepare: Prepare | None = None,
    ) -> Float[Array, "batch tokens embed"]:
        """Embeds all patches row by row, or only the patches `keep` of each image.

        Args:
          prepare: normalizes pixels; None for pixels that are normalized already. It is applied
            after the selection, so dropped patches cost nothing beyond their stored pixels.
        """
        patches = patchify(image, self.patch_size)
        if keep is not None:
            patches = take_tokens(patches, keep)
        return PatchProjection(
            ("patch_height", "patch_width", "channels", "embed"),
            ("norm",),
            self.compute.unquantized(),
            _scaled_to_inputs,
            use_bias=self.use_bias,
            width=self.width,
            name="projection",
        )(prepare(patches) if prepare else patches)


def _scaled_to_inputs(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initializes with truncated normal numbers of standard deviation 1 / sqrt(inputs)."""
    return nn.initializers.truncated_normal(1 / math.sqrt(shape[0]))(key, shape, dtype)


class VisionTransformer(nn.Module):
    """Encodes an image as one vector, or as one vector for each token.

    The sequence is the class token if any, the registers if any, then the patches row by row.

    Attributes:
      image_size: height and width in pixels; multiples of `patch_size`.
      pooling: "cls" (the class token), "mean" (over the patches), "map" (`AttentionPooling` over
        all tokens) or "none" (returns all tokens).
      class_token: whether there is a class token; pooling "cls" needs it.
      position: "learned", "sincos" (fixed, see `positions.sincos_2d`) or "none".
      class_position: whether the learned table has a row for the class token (ViT, CLIP, MAE: yes;
        big_vision: no).
      registers: further learned tokens, without position (Darcet et al. 2024).
      patch_bias: whether the projection of patches has a bias (CLIP: no).
      pre_norm: LayerNorm before the blocks (CLIP).
      norm_after_pool: the last LayerNorm comes after the pooling instead of before it. With pooling
        "none" the tower then has no last norm: the module that pools its tokens has it.
    """

    image_size: tuple[int, int]
    patch_size: int
    transformer: TransformerConfig
    pooling: str = "cls"
    class_token: bool = True
    position: str = "learned"
    class_position: bool = True
    registers: int = 0
    patch_bias: bool = True
    pre_norm: bool = False
    norm_after_pool: bool = False
    compute: ComputeConfig = ComputeConfig()

    # For `shared_forward`: methods that several losses may share -> the fields that do not change
    # their results. Towers that differ in their pooling share the sequence.
    SHARED: ClassVar[Mapping[str, tuple[str, ...]]] = {"__call__": (), "_sequence": ("pooling",)}

    @property
    def width(self) -> int:
        """The width of the features."""
        return self.transformer.width

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def patches(self) -> int:
        """The number of patches of an image."""
        return math.prod(self.grid)

    @property
    def prefix_tokens(self) -> int:
        """The number of tokens before the patches: the class token and the registers."""
        return self.class_token + self.registers

    @property
    def tokens(self) -> int:
        """The length of the encoder's sequence when all patches are visible."""
        return self.prefix_tokens + self.patches

    IS: ClassVar[str] = "an image tower alone"  # in words, for errors

    def towers(self) -> dict[str, nn.Module]:
        """Returns itself, under the name of the image tower in larger models."""
        return {"image": self}

    def example(self, dtype: Any = jnp.float32) -> tuple[Num[Array, "1 height width 3"]]:
        """Returns the arguments of a call, for one image of zeros."""
        return (jnp.zeros((1, *self.image_size, 3), dtype),)

    @nn.compact
    def __call__(
        self,
        image: Num[Array, "batch height width channels"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
        prepare: Prepare | None = None,
    ) -> Float[Array, "sequences embed"] | Float[Array, "sequences tokens embed"]:
        """Returns the pooled features, in `compute.dtype`; ValueError for another image size.

        Args:
          image: normalized pixels, or stored pixels that `prepare` normalizes.
          keep: indices of the patches to encode, for each image; None for all. Dropped patches cost
            nothing.
          train: whether to apply stochastic depth, which needs the random stream "drop_path".
          prepare: see `PatchEmbedding`.
        """
        x = self._pool(self._sequence(image, keep, train, prepare))
        if self.norm_after_pool and self.pooling != "none":
            x = norm(self.transformer, self.compute.dtype, "norm")(x)
        return x

    def _sequence(
        self,
        image: Num[Array, "batch height width channels"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
        prepare: Prepare | None = None,
    ) -> Float[Array, "sequences tokens embed"]:
        """Returns all tokens before the pooling."""
        if image.shape[1:3] != tuple(self.image_size):
            raise ValueError(
                f"the model takes images of {self.image_size[0]} x {self.image_size[1]} pixels, "
                f"not {image.shape[1]} x {image.shape[2]}"
            )
        patch_embedding = PatchEmbedding(
            self.patch_size, self.width, self.patch_bias, self.compute, name="patch_embedding"
        )
        x = self._embed(patch_embedding(image, keep, prepare), keep)
        if self.pre_norm:
            x = norm(self.transformer, self.compute.dtype, "pre_norm")(x)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        final_norm = not self.norm_after_pool
        encoder = layers.Encoder(
            self.transformer, self.compute, final_norm=final_norm, name="encoder"
        )
        return encoder(x, train=train)

    def _embed(
        self, x: Float[Array, "batch kept width"], keep: Int[Array, "batch kept"] | None
    ) -> Float[Array, "batch tokens width"]:
        """Adds positions, and prepends the class token and the registers."""
        first = self.class_token and self.class_position and self.position == "learned"
        if self.position != "none":
            if self.position == "learned":
                # The deviation is big_vision's, `get_posemb`.
                table = layers.position_embedding(
                    self, first + self.patches, self.width, stddev=self.width**-0.5
                )
            else:
                table = jnp.asarray(sincos_2d(self.grid, self.width))
            # The table's first row, if any, belongs to the class token.
            positions = table[None, int(first) :].astype(x.dtype)
            if keep is not None:
                # [batch, kept, width]: each image keeps other patches.
                positions = jnp.take(positions[0], keep, axis=0)
            x = x + positions
        prefix = []
        if self.class_token:
            token = self._token("class_token", 1).astype(x.dtype)
            prefix.append(token + table[:1].astype(x.dtype) if first else token)
        if self.registers:
            prefix.append(self._token("registers", self.registers).astype(x.dtype))
        if prefix:
            tokens = jnp.concatenate(prefix)
            tokens = jnp.broadcast_to(tokens, (x.shape[0], *tokens.shape))
            x = jnp.concatenate([tokens, x], axis=1)
        return x

    def _token(self, name: str, count: int) -> Float[Array, "count width"]:
        init = named(nn.initializers.normal(0.02), None, "embed")
        return self.param(name, init, (count, self.width))

    def _pool(self, x: Float[Array, "batch tokens width"]) -> Float[Array, "batch *tokens width"]:
        if self.pooling == "cls":
            return x[:, 0]
        if self.pooling == "mean":
            return x[:, self.prefix_tokens :].mean(axis=1)
        if self.pooling == "map":
            return layers.AttentionPooling(self.transformer, self.compute, name="pooling")(x)
        return x


@keywords_of(VisionTransformer, TransformerConfig, optional=True)
def make_vit(
    variant: str | None = None,
    image_size: int | Sequence[int] | None = None,
    *,
    patch_size: int | None = None,
    class_token: bool | None = None,
    compute: ComputeConfig = PLAIN,
    **fields: Any,
) -> VisionTransformer:
    """Makes a `VisionTransformer` of a named size: `make_vit("B/16", 224, pooling="map")`.

    Args:
      variant: a name in `values.VARIANTS`, a slash and the side of a patch; None where
        `patch_size`, `width`, `depth`, `mlp_dim` and `heads` are given.
      image_size: a side, or height and width; `config.image_size` where a config leaves it out.
      patch_size: the side of a patch, instead of the variant's.
      class_token: by default there is one for the pooling "cls" alone.
      fields: of `VisionTransformer`, and of `TransformerConfig` where not the variant's.

    Raises:
      ValueError: unknown names, sizes that do not fit each other, or patches that do not tile the
        image.
    """
    name, patch_size = split_variant(variant, patch_size)
    if image_size is None:
        raise ValueError("image_size is not set: set config.image_size")
    if class_token is None:
        class_token = fields.get("pooling", "cls") == "cls"
    size = (image_size,) * 2 if isinstance(image_size, int) else tuple(image_size)
    fields |= {"image_size": size, "patch_size": patch_size, "class_token": class_token}
    vit = make_tower(VisionTransformer, compute, name, **fields)
    height, width = vit.image_size
    if height % vit.patch_size or width % vit.patch_size or min(height, width) < 1:
        raise ValueError(
            f"patches of {vit.patch_size} do not tile an image of {height} x {width} pixels"
        )
    check_choice("image pooling", vit.pooling, POOLINGS)
    check_choice("position", vit.position, POSITIONS)
    if vit.pooling == "cls" and not vit.class_token:
        raise ValueError("pooling 'cls' needs a class token")
    if vit.norm_after_pool and vit.pooling == "none":
        raise ValueError("norm_after_pool needs a pooling")
    if vit.position == "sincos":
        sincos_2d((1, 1), vit.width)  # raises for a width that does not fit
    return vit

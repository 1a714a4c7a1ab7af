"""The dual encoder of CLIP and SigLIP: two towers with a shared embedding space.

Sources: Radford et al. 2021 (CLIP); Zhai et al. 2023 (SigLIP).
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from vlp_jax.models.dense import Dense
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import Images, Pixels, check_choice
from vlp_jax.models.vit import VisionTransformer

HEADS = ("linear", "linear_bias", "none")


def l2_normalize(x: Float[Array, "*batch dim"], eps: float = 1e-12) -> Float[Array, "*batch dim"]:
    """Computes x / max(|x|, eps) along the last dimension, in float32."""
    x = x.astype(jnp.float32)
    # The bound is inside the root: the gradient of a norm at x = 0 would be NaN.
    square = jnp.sum(x * x, axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(square, eps * eps))


class PairModel(nn.Module):
    """Base of models that embed images and texts as unit vectors in one space.

    A model has the towers `image` and `text`, `embed_dim`, `logit_scale_init` and
    `logit_bias_init`. Its `setup` calls `make_logits` last.
    """

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, for one example of zeros."""
        return (*self.image.example(jnp.uint8), *self.text.example())

    def projection(self, width: int, use_bias: bool = False) -> Dense:
        """Makes the projection of `width` features into the shared space."""
        return Dense(
            ("embed", "projection"),
            ("projection",),
            self.image.compute.unquantized(),
            # As in OpenAI's CLIP, `initialize_parameters` and `VisionTransformer.proj`.
            nn.initializers.normal(width**-0.5),
            use_bias=use_bias,
            features=self.embed_dim,
        )

    def make_logits(self) -> None:
        """Makes the parameters `logit_scale` and, if it has an initial value, `logit_bias`."""
        for name in ("logit_scale", "logit_bias"):
            value = getattr(self, f"{name}_init")
            if value is not None:
                init = nn.initializers.constant(value)
                setattr(self, name, self.param(name, init, (), jnp.float32))

    def logit_parameters(self) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns `logit_scale` (still a logarithm) and `logit_bias` (0 if none)."""
        bias = jnp.float32(0) if self.logit_bias_init is None else self.logit_bias
        return self.logit_scale, bias

    def __call__(
        self,
        image: Images,
        text: Int[Array, "batch tokens"],
        keep: Int[Array, "batch kept"] | None = None,
        train: bool = False,
    ) -> dict[str, Any]:
        """Returns both embeddings, `logit_scale` (a logarithm) and `logit_bias` (0 if none).

        Args:
          image: values in [0, 255].
          keep: indices of the patches that the tower sees, for each image; None for all.
          train: whether to apply stochastic depth, which needs the random stream "drop_path".
        """
        scale, bias = self.logit_parameters()
        return {
            "image": self.embed_image(image, keep, train),
            "text": self.embed_text(text, train),
            "logit_scale": scale,
            "logit_bias": bias,
        }


class DualEncoder(PairModel):
    """An image tower and a text tower with the embedding width `embed_dim`, and the logit scale.

    Attributes:
      image, text: the towers.
      embed_dim: width of the shared embedding.
      logit_scale_init: initial natural logarithm of the factor on the cosine similarity.
      logit_bias_init: initial bias of the logits, for the sigmoid loss; None for no bias.
      image_head, text_head: the projection from a tower's features to `embed_dim`: "linear" (CLIP),
        "linear_bias" (SigLIP's texts) or "none" (SigLIP's images).
      pixels: normalization of the pixels.
    """

    image: VisionTransformer
    text: TextTransformer
    embed_dim: int
    logit_scale_init: float
    logit_bias_init: float | None = None
    image_head: str = "linear"
    text_head: str = "linear"
    pixels: Pixels = Pixels()

    IS: ClassVar[str] = "an image and a text tower"  # in words, for errors

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image, "text": self.text}

    def setup(self) -> None:
        self.image_projection = self._head(self.image_head, self.image)
        self.text_projection = self._head(self.text_head, self.text)
        self.make_logits()

    def _head(self, kind: str, tower: VisionTransformer | TextTransformer) -> Dense | None:
        return None if kind == "none" else self.projection(tower.width, kind == "linear_bias")

    def embed_image(
        self, image: Images, keep: Int[Array, "batch kept"] | None = None, train: bool = False
    ) -> Float[Array, "batch embed"]:
        """Returns unit vectors of images, float32; `keep` restricts the tower to some patches."""
        features = self.image(image, keep, train, self.pixels.normalize)
        head = self.image_projection
        return l2_normalize(features if head is None else head(features))

    def image_features(
        self, image: UInt8[Array, "batch height width 3"]
    ) -> Float[Array, "batch width"]:
        """Returns the image tower's output for uint8 images, before the projection, float32."""
        return self.image(self.pixels.normalize(image)).astype(jnp.float32)

    def embed_text(
        self, text: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch embed"]:
        """Returns unit vectors of token ids, float32."""
        features, head = self.text(text, train), self.text_projection
        return l2_normalize(features if head is None else head(features))


def make_dual_encoder(
    image: VisionTransformer,
    text: TextTransformer,
    embed_dim: int,
    *,
    image_head: str = "linear",
    text_head: str = "linear",
    **fields: Any,
) -> DualEncoder:
    """Makes a `DualEncoder` with these `fields`, and checks that its towers fit.

    Raises:
      ValueError: an unknown head, a tower without pooling, or a tower without a projection whose
        width is not `embed_dim`.
    """
    for name, tower, head in (("image", image, image_head), ("text", text, text_head)):
        check_choice(f"{name}_head", head, HEADS)
        if tower.pooling == "none":
            raise ValueError(f"the {name} tower needs a pooling to end in one vector")
        if head == "none" and tower.width != embed_dim:
            raise ValueError(
                f"the {name} tower of width {tower.width} without projection does not end in "
                f"embed_dim {embed_dim}"
            )
    return DualEncoder(image, text, embed_dim, image_head=image_head, text_head=text_head, **fields)

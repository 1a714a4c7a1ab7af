"""Classifiers: of images, and of questions about images (fused image and text)."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.dense import Dense, named
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.text import TextTransformer
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

# Initial standard deviation of a head that is trained with its tower: facebookresearch/mae,
# main_finetune.py.
HEAD_STDDEV = 2e-5


def score_head(outputs: int, compute: ComputeConfig, name: str) -> Dense:
    """Makes a linear layer from features to the scores of `outputs` classes.

    Its kernel starts near zero, so that the tower's first gradients are small.
    """
    return Dense(
        ("embed", None),
        (None,),
        compute.unquantized(),
        nn.initializers.truncated_normal(HEAD_STDDEV),
        features=outputs,
        name=name,
    )


class Classifier(nn.Module):
    """An image tower, with a pooling, and a linear head.

    He et al. 2022 fine-tune with the pooling "mean" and `norm_after_pool`.
    """

    image: VisionTransformer
    classes: int
    pixels: Pixels = Pixels()

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image}

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, for one example of zeros."""
        return self.image.example(jnp.uint8)

    def setup(self) -> None:
        self.head = score_head(self.classes, self.image.compute, "head")

    def features(self, image: Images, train: bool = False) -> Float[Array, "batch embed"]:
        """Returns the pooled features of images with values in [0, 255]."""
        return self.image(image, train=train, prepare=self.pixels.normalize)

    def embed_image(self, image: Images) -> Float[Array, "batch embed"]:
        """Returns unit vectors of images with values in [0, 255], float32."""
        return l2_normalize(self.features(image))

    def __call__(self, image: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """Returns the score of each class, float32. Images have values in [0, 255]."""
        return self.head(self.features(image, train)).astype(jnp.float32)


class Fusion(nn.Module):
    """Self-attention over a class token, the image's tokens and the text's tokens.

    This is the "merged attention" of Dou et al. 2022 (METER, 3.1.3), as in ViLT (Kim et al. 2021):
    image and text share the layers. Each has a projection to their width, and the biases of the two
    projections tell image and text apart. Tokens carry their positions from the towers. The padding
    of the text is masked.
    """

    transformer: TransformerConfig
    compute: ComputeConfig = ComputeConfig()

    @nn.compact
    def __call__(
        self,
        image: Float[Array, "batch image_tokens image_width"],
        text: Float[Array, "batch text_tokens text_width"],
        text_lengths: Int[Array, " batch"],
        train: bool = False,
    ) -> Float[Array, "batch width"]:
        """Returns the class token after the layers and a LayerNorm; lengths are without padding."""
        init = named(nn.initializers.normal(0.02), None, "embed")
        width = self.transformer.width
        first = self.param("class_token", init, (1, width)).astype(self.compute.dtype)
        first = jnp.broadcast_to(first, (len(image), 1, width))
        parts = [first, self._projected(image, "image"), self._projected(text, "text")]
        x = jnp.concatenate(parts, axis=1)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        # The text comes last: then its padding ends the sequence, and lengths can mask it.
        mask = AttentionMask(lengths=(1 + image.shape[1] + text_lengths).astype(jnp.int32))
        x = layers.Encoder(self.transformer, self.compute, name="encoder")(x, mask, train)
        return x[:, 0]

    def _projected(self, x: Array, name: str) -> Array:
        return Dense(
            ("embed", None),
            ("norm",),
            self.compute.unquantized(),
            bias_init=nn.initializers.normal(0.02),
            features=self.transformer.width,
            name=f"{name}_projection",
        )(x)


@keywords_of(TransformerConfig)
def make_fusion(*, compute: ComputeConfig = PLAIN, **fields: Any) -> Fusion:
    """Makes a `Fusion` whose layers have these fields of `TransformerConfig`."""
    return make_tower(Fusion, compute, **fields)


class QuestionAnswerer(nn.Module):
    """Scores a closed list of answers to a question about an image; towers have no pooling."""

    image: VisionTransformer
    text: TextTransformer
    fusion: Fusion
    answers: int
    pixels: Pixels = Pixels()

    def towers(self) -> dict[str, nn.Module]:
        """Returns the towers by the names of their parameters."""
        return {"image": self.image, "text": self.text, "fusion": self.fusion}

    def example(self) -> tuple[Any, ...]:
        """Returns arguments of a call, for one example of zeros."""
        return (*self.image.example(jnp.uint8), *self.text.example())

    def setup(self) -> None:
        self.head = score_head(self.answers, self.image.compute, "head")

    def __call__(
        self, image: Images, text: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch answers"]:
        """Returns the score of each answer, float32. Images have values in [0, 255]."""
        seen = self.image(image, train=train, prepare=self.pixels.normalize)
        read = self.text(text, train)
        x = self.fusion(seen, read, self.text.lengths(text), train)
        return self.head(x).astype(jnp.float32)

"""Image and text together: a Transformer over the tokens of both towers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.attention_mask import AttentionMask
from vlp_jax.models.classifier import score_head
from vlp_jax.models.dense import Dense
from vlp_jax.models.parameters import named
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


class Fusion(nn.Module):
    """Self-attention over a class token, the tokens of an image and those of a text.

    The "merged attention" of Dou et al. 2022 (METER, 3.1.3), as in ViLT (Kim et al. 2021): image
    and text share the layers. Each has a projection to the width of these, whose bias tells the two
    apart; where a token stands is known from its tower. The padding of the text is not seen.
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
        """The class token after the layers and a LayerNorm.

        Args:
          text_lengths: tokens of each text that are seen, from the first.
          train: whether stochastic depth is at work (it needs the random stream "drop_path").
        """
        init = named(nn.initializers.normal(0.02), None, "embed")
        width = self.transformer.width
        first = self.param("class_token", init, (1, width)).astype(self.compute.dtype)
        first = jnp.broadcast_to(first, (len(image), 1, width))
        parts = [first, self._projected(image, "image"), self._projected(text, "text")]
        x = jnp.concatenate(parts, axis=1)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        # The text comes last, so that its padding is the end of the whole sequence.
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
    """A `Fusion` whose layers have these fields of `TransformerConfig`.

    Raises:
      ValueError: sizes that do not fit each other.
    """
    return make_tower(Fusion, compute, **fields)


class QuestionAnswerer(nn.Module):
    """Scores a closed list of answers to a question about an image.

    Attributes:
      image, text: the towers, without pooling.
      fusion: what looks at both.
      answers: how many answers there are.
      pixels: how they are normalized.
    """

    image: VisionTransformer
    text: TextTransformer
    fusion: Fusion
    answers: int
    pixels: Pixels = Pixels()

    def towers(self) -> dict[str, nn.Module]:
        """Its towers, by the names that their parameters have."""
        return {"image": self.image, "text": self.text, "fusion": self.fusion}

    def example(self) -> tuple[Any, ...]:
        """The inputs of a call, of one example, all 0."""
        return (*self.image.example(jnp.uint8), *self.text.example())

    def setup(self) -> None:
        self.head = score_head(self.answers, self.image.compute, "head")

    def __call__(
        self, image: Images, text: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch answers"]:
        """The score of each answer, float32.

        Args:
          image: values in [0, 255].
          text: token ids of the question.
          train: whether stochastic depth is at work (it needs the random stream "drop_path").
        """
        seen = self.image(image, train=train, prepare=self.pixels.normalize)
        read = self.text(text, train)
        x = self.fusion(seen, read, self.text.lengths(text), train)
        return self.head(x).astype(jnp.float32)

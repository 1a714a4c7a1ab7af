"""Image and text together: a Transformer over the tokens of both towers."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax.models import layers
from vlp_jax.models.classifier import score_head
from vlp_jax.models.dual_encoder import Pixels, normalize_pixels
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.vit import VisionTransformer


class Fusion(nn.Module):
    """Self-attention over a class token, the tokens of an image and those of a text.

    The "merged attention" of Dou et al. 2022 (METER, 3.1.3), as in ViLT (Kim et al. 2021): image
    and text share the layers. Each has a projection to the width of these, whose bias tells the two
    apart; where a token stands is known from its tower. The padding of the text is not seen.
    """

    width: int
    depth: int
    mlp_dim: int
    heads: int
    activation: str = "gelu_tanh"
    norm_eps: float = 1e-6
    stochastic_depth: float = 0.0
    attention: str = "xla"
    quantization: str = "none"
    scan_layers: bool = True
    remat: str = "none"
    dtype: Any = jnp.float32

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
        init = layers.named(nn.initializers.normal(0.02), None, "embed")
        first = self.param("class_token", init, (1, self.width)).astype(self.dtype)
        first = jnp.broadcast_to(first, (len(image), 1, self.width))
        parts = [first, self._projected(image, "image"), self._projected(text, "text")]
        x = jnp.concatenate(parts, axis=1)
        x = nn.with_logical_constraint(x, ("batch", "act_tokens", "act_embed"))
        # The text comes last, so that its padding is the end of the whole sequence.
        lengths = (1 + image.shape[1] + text_lengths).astype(jnp.int32)
        x = layers.Encoder(
            depth=self.depth,
            heads=self.heads,
            mlp_dim=self.mlp_dim,
            activation=self.activation,
            norm_eps=self.norm_eps,
            stochastic_depth=self.stochastic_depth,
            attention=self.attention,
            quantization=self.quantization,
            scan_layers=self.scan_layers,
            remat=self.remat,
            dtype=self.dtype,
            name="encoder",
        )(x, lengths, train)
        return x[:, 0]

    def _projected(self, x: Array, name: str) -> Array:
        return nn.Dense(
            self.width,
            dtype=self.dtype,
            name=f"{name}_projection",
            kernel_init=layers.named(nn.initializers.xavier_uniform(), "embed", None),
            bias_init=layers.named(nn.initializers.normal(0.02), "norm"),
        )(x)

    def flops(self, image: VisionTransformer, text: TextTransformer) -> float:
        """Forward FLOPs of one pair, without the towers."""
        seen = image.tokens * image.width + text.context_length * text.width
        tokens = 1 + image.tokens + text.context_length
        return 2.0 * seen * self.width + layers.transformer_flops(
            self.depth, tokens, self.width, self.mlp_dim
        )


class QuestionAnswerer(nn.Module):
    """Scores a closed list of answers to a question about an image.

    Attributes:
      image, text: the towers, without pooling.
      fusion: what looks at both.
      answers: how many answers there are.
      image_mean, image_std: of the pixels, scaled to [0, 1], a value per channel.
    """

    image: VisionTransformer
    text: TextTransformer
    fusion: Fusion
    answers: int
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def setup(self) -> None:
        self.head = score_head(self.answers, self.image.dtype, "head")

    def __call__(
        self, image: Pixels, text: Int[Array, "batch tokens"], train: bool = False
    ) -> Float[Array, "batch answers"]:
        """The score of each answer, float32.

        Args:
          image: values in [0, 255].
          text: token ids of the question.
          train: whether stochastic depth is at work (it needs the random stream "drop_path").
        """
        pixels = normalize_pixels(image, self.image_mean, self.image_std)
        seen = self.image(pixels, train=train)
        read = self.text(text, train)
        x = self.fusion(seen, read, self.text.lengths(text), train)
        return self.head(x).astype(jnp.float32)

    def flops(self) -> float:
        """Forward FLOPs of one image and its question."""
        towers = self.image.flops() + self.text.flops()
        fused = self.fusion.flops(self.image, self.text)
        return towers + fused + 2.0 * self.fusion.width * self.answers

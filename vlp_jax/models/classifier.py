"""An image tower that ends in the scores of classes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models import layers
from vlp_jax.models.dual_encoder import Pixels, l2_normalize, normalize_pixels
from vlp_jax.models.vit import VisionTransformer

# Of a head that is trained with its tower: facebookresearch/mae, main_finetune.py.
HEAD_STDDEV = 2e-5


def score_head(outputs: int, dtype: Any, name: str) -> nn.Dense:
    """A linear layer from features to the scores of `outputs` classes, which begins next to zero.

    So the first scores are equal, and the first gradients of the tower are small.
    """
    return nn.Dense(
        outputs,
        dtype=dtype,
        name=name,
        kernel_init=layers.named(nn.initializers.truncated_normal(HEAD_STDDEV), "embed", None),
        bias_init=layers.named(nn.initializers.zeros_init(), None),
    )


class Classifier(nn.Module):
    """An image tower with a linear head.

    Attributes:
      image: the tower, with a pooling. For the form in which He et al. 2022 fine-tune, it has the
        pooling "mean" and `norm_after_pool`.
      classes: how many there are.
      image_mean, image_std: of the pixels, scaled to [0, 1], a value per channel.
    """

    image: VisionTransformer
    classes: int
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def setup(self) -> None:
        self.head = score_head(self.classes, self.image.dtype, "head")

    def features(self, image: Pixels, train: bool = False) -> Float[Array, "batch embed"]:
        """The pooled features of images with values in [0, 255]."""
        return self.image(normalize_pixels(image, self.image_mean, self.image_std), train=train)

    def embed_image(self, image: Pixels) -> Float[Array, "batch embed"]:
        """Unit vectors of images with values in [0, 255], float32."""
        return l2_normalize(self.features(image))

    def __call__(self, image: Pixels, train: bool = False) -> Float[Array, "batch classes"]:
        """The score of each class, float32, of images with values in [0, 255]."""
        return self.head(self.features(image, train)).astype(jnp.float32)

    def flops(self) -> float:
        """Forward FLOPs of one image."""
        return self.image.flops() + 2.0 * self.image.width * self.classes

"""An image tower that ends in the scores of classes."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models.dense import Dense
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.values import ComputeConfig, Images, Pixels
from vlp_jax.models.vit import VisionTransformer

# Of a head that is trained with its tower: facebookresearch/mae, main_finetune.py.
HEAD_STDDEV = 2e-5


def score_head(outputs: int, compute: ComputeConfig, name: str) -> Dense:
    """A linear layer from features to the scores of `outputs` classes, which begins next to zero.

    So the first scores are equal, and the first gradients of the tower are small.
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
    """An image tower with a linear head.

    Attributes:
      image: the tower, with a pooling. For the form in which He et al. 2022 fine-tune, it has the
        pooling "mean" and `norm_after_pool`.
      classes: how many there are.
      pixels: how they are normalized.
    """

    image: VisionTransformer
    classes: int
    pixels: Pixels = Pixels()

    def towers(self) -> dict[str, nn.Module]:
        """Its towers, by the names that their parameters have."""
        return {"image": self.image}

    def example(self) -> tuple[Any, ...]:
        """The inputs of a call, of one example, all 0."""
        return self.image.example(jnp.uint8)

    def setup(self) -> None:
        self.head = score_head(self.classes, self.image.compute, "head")

    def features(self, image: Images, train: bool = False) -> Float[Array, "batch embed"]:
        """The pooled features of images with values in [0, 255]."""
        return self.image(image, train=train, prepare=self.pixels.normalize)

    def embed_image(self, image: Images) -> Float[Array, "batch embed"]:
        """Unit vectors of images with values in [0, 255], float32."""
        return l2_normalize(self.features(image))

    def __call__(self, image: Images, train: bool = False) -> Float[Array, "batch classes"]:
        """The score of each class, float32, of images with values in [0, 255]."""
        return self.head(self.features(image, train)).astype(jnp.float32)

"""An image tower with a linear classification head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from vlp_jax.models.dense import Dense
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.values import ComputeConfig, Images, Pixels
from vlp_jax.models.vit import VisionTransformer

# Initial standard deviation of a head that is trained with its tower: facebookresearch/mae,
# main_finetune.py.
HEAD_STDDEV = 2e-5


def score_head(outputs: int, compute: ComputeConfig, name: str) -> Dense:
    """Makes a linear layer from features to the scores of `outputs` classes.

    Its kernel starts near zero. So the first scores are about equal, and the first gradients of the
    tower are small.
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
      image: the tower, with a pooling. He et al. 2022 fine-tune with the pooling "mean" and
        `norm_after_pool`.
      classes: the number of classes.
      pixels: normalization of the pixels.
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

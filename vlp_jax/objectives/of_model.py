"""Makes an objective for a model that was loaded without one, from another project's files."""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder, l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import Pixels
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.base import Field, Function, Objective, Params, of_images
from vlp_jax.objectives.coca import coca_parts
from vlp_jax.objectives.contrastive import Contrastive
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding
from vlp_jax.objectives.weight import Weight


@dataclasses.dataclass(frozen=True)
class Features(Objective):
    """Embeds images with an image tower alone. It has no loss."""

    model: VisionTransformer
    pixels: Pixels = Pixels()

    @property
    def reads(self) -> dict[str, Field]:
        """The field that the functions take: an image."""
        return {"image": Field.pixels(self.model.image_size)}

    def functions(self) -> dict[str, Function]:
        """Returns `embed_image`: unit vectors of images with values in [0, 255]."""
        return {"embed_image": of_images(self._embed, "unit vectors")}

    def _embed(self, params: Params, image: Array) -> Array:
        features = self.model.apply({"params": params}, self.pixels.normalize(image))
        if features.ndim == 3 and self.model.class_token:  # a tower without pooling
            features = features[:, 0]
        elif features.ndim == 3:
            features = features[:, self.model.prefix_tokens :].mean(axis=1)
        return l2_normalize(features)


def objective_of(
    model: nn.Module, *, pixels: Pixels, mask_ratio: float, normalize_targets: bool
) -> Objective:
    """Makes the objective whose functions a model offers.

    Args:
      pixels: normalization of the pixels, for an image tower alone. Other models hold theirs.
      mask_ratio, normalize_targets: fields of `MaskedAutoencoding`, for a masked autoencoder.
    """
    made: dict[type, Any] = {
        # max_logit_scale 0 is no bound: a foreign scale is taken as it is.
        CoCa: lambda: coca_parts(model, contrast=Weight(), caption=Weight(), max_logit_scale=0.0),
        DualEncoder: lambda: Contrastive(
            model, "softmax" if model.logit_bias_init is None else "sigmoid", max_logit_scale=0.0
        ),
        MaskedAutoencoder: lambda: MaskedAutoencoding(model, mask_ratio, normalize_targets),
        VisionTransformer: lambda: Features(model, pixels),
    }
    return made[type(model)]()

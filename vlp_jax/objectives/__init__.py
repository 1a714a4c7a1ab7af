"""Objectives: models with their losses, by the names that `config.objective.name` takes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
from jaxtyping import Array

from vlp_jax import config as config_lib
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder, l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder
from vlp_jax.models.values import Pixels
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives.base import Field, Function, Objective, Params, of_images
from vlp_jax.objectives.captioning import make_captioning
from vlp_jax.objectives.classification import make_classification, make_question_answering
from vlp_jax.objectives.coca import coca_parts, make_coca
from vlp_jax.objectives.composite import Composite, make_composite
from vlp_jax.objectives.contrastive import Contrastive, make_contrastive
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding, make_masked_autoencoding
from vlp_jax.objectives.weight import StepsOf, Weight


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


def make_objective(
    section: Mapping[str, Any],
    tokenizer: Any,
    steps_of: StepsOf | None = None,
    where: str = "config.objective",
) -> Objective:
    """Makes the objective that `config.objective` describes.

    Args:
      section: `name`, a key of `OBJECTIVES`, and the arguments of its constructor.
      tokenizer: has `vocab_size`, `context_length`, `pad_id` and `eos_id`; None without text.
      steps_of: converts durations to steps, for weights that change during a run; None where
        nothing is trained.
      where: the name of the section in errors.

    Raises:
      UserError: unknown names or keys, sizes that do not fit each other.
    """
    constructor = config_lib.select(OBJECTIVES, section, where)
    # A constructor takes these two only if it has a use for them.
    given = {"tokenizer": tokenizer, "steps_of": steps_of}
    asked = inspect.signature(constructor).parameters
    return config_lib.build(
        constructor, section, where, **{key: given[key] for key in given if key in asked}
    )


def _composite(*, parts: Mapping[str, Any], tokenizer: Any, steps_of: StepsOf | None) -> Composite:
    def make_part(section: Mapping[str, Any], where: str) -> Objective:
        return make_objective(section, tokenizer, steps_of, where)

    return make_composite(make_part, parts, steps_of)


OBJECTIVES = {
    "captioning": make_captioning,
    "classification": make_classification,
    "coca": make_coca,
    "composite": _composite,
    "contrastive": make_contrastive,
    "masked_autoencoding": make_masked_autoencoding,
    "question_answering": make_question_answering,
}

"""Masked autoencoding: He et al. 2022, "Masked Autoencoders Are Scalable Vision Learners"."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray, UInt8

from vlp_jax import config as config_lib
from vlp_jax.models.dual_encoder import l2_normalize
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, make_masked_decoder
from vlp_jax.models.masking import PatchMask, kept_patches, random_mask
from vlp_jax.models.values import IMAGENET, Pixels, keywords_of
from vlp_jax.models.vit import make_vit, unpatchify
from vlp_jax.objectives.base import (
    Batch,
    Context,
    Examples,
    Field,
    Function,
    Objective,
    Params,
    of_images,
)
from vlp_jax.objectives.compute import make_compute

VARIANCE_EPS = 1e-6
EVALUATION_SEED = 0  # fixed, so that evaluations at different steps see the same masks


def patch_statistics(
    targets: Float[Array, "batch patches outputs"],
) -> tuple[Float[Array, "batch patches 1"], Float[Array, "batch patches 1"]]:
    """Computes the mean and the standard deviation that normalize the pixels of each patch.

    The variance is the unbiased one (divided by n - 1) plus 1e-6, as in facebookresearch/mae,
    `forward_loss`.
    """
    mean = targets.mean(axis=-1, keepdims=True)
    variance = targets.var(axis=-1, ddof=1, keepdims=True)
    return mean, jnp.sqrt(variance + VARIANCE_EPS)


def hidden_errors(
    prediction: Float[Array, "batch patches outputs"],
    targets: Float[Array, "batch patches outputs"],
    hidden: Float[Array, "batch patches"],
    normalize_targets: bool,
) -> Float[Array, " batch"]:
    """Computes the mean squared error over the hidden patches of each image."""
    if normalize_targets:
        mean, std = patch_statistics(targets)
        targets = (targets - mean) / std
    error = jnp.square(prediction - targets).mean(axis=-1)
    # No 0 / 0: the config hides at least one patch (`make_masked_autoencoding`).
    return (error * hidden).sum(axis=-1) / hidden.sum(axis=-1)


@dataclasses.dataclass(frozen=True)
class MaskedAutoencoding(Objective):
    """Predicts the pixels of hidden patches from the visible patches of an image.

    Attributes:
      model: encoder and decoder.
      mask_ratio: share of the patches that are hidden.
      normalize_targets: True predicts the pixels of each patch after normalizing them by the mean
        and standard deviation of the patch.
    """

    model: MaskedAutoencoder
    mask_ratio: float
    normalize_targets: bool

    @property
    def reads(self) -> dict[str, Field]:
        """The field of the loss: an image."""
        return {"image": Field.pixels(self.model.image.image_size)}

    @property
    def kept(self) -> int:
        """The number of visible patches of an image."""
        return kept_patches(self.model.image.patches, self.mask_ratio)

    def mask(self, rng: PRNGKeyArray, batch: int) -> PatchMask:
        """Draws a random mask for each of `batch` images."""
        return random_mask(rng, batch, self.model.image.patches, self.kept)

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Returns images and their random masks."""
        # `forward` takes the second half of the key, for stochastic depth.
        key, image = jax.random.split(context.rng)[0], batch["image"]
        return {"image": image, "mask": self.mask(key, len(image))}

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the mean squared error over the hidden patches of each image."""
        rngs = {"drop_path": jax.random.split(context.rng)[1]}
        errors = self._errors(params, batch["image"], batch["mask"], context.train, rngs=rngs)
        return {"loss": (errors, jnp.ones_like(errors))}

    def _errors(
        self, params: Params, image: Array, mask: PatchMask, train: bool = False, **more: Any
    ) -> Float[Array, " batch"]:
        prediction = self.model.apply({"params": params}, image, mask, train, **more)
        targets = self.model.targets(image)
        return hidden_errors(prediction, targets, mask.hidden, self.normalize_targets)

    def functions(self) -> dict[str, Function]:
        """Returns the functions of a masked autoencoder. All take uint8 images.

        - `reconstruction_error`: the loss of each image.
        - `reconstruct`: pictures, see `MaskedAutoencoding.reconstruct`.
        - `image_features`: pooled features of the whole image; `embed_image` normalizes them.

        The first two hide the same patches in every call.
        """

        def mask(image: Array) -> PatchMask:
            return self.mask(jax.random.key(EVALUATION_SEED), len(image))

        def features(params: Params, image: Array) -> Array:
            features = self.model.apply({"params": params}, image, method="features")
            return features.astype(jnp.float32)

        errors = lambda params, x: self._errors(params, x, mask(x))  # noqa: E731
        views = lambda params, x: self.reconstruct(params, x, mask(x))  # noqa: E731
        unit = lambda params, x: l2_normalize(features(params, x))  # noqa: E731
        return {
            "reconstruction_error": of_images(errors, "the error of each image"),
            "reconstruct": of_images(views, "pictures, in [0, 1]"),
            "embed_image": of_images(unit, "unit vectors"),
            "image_features": of_images(features, "features"),
        }

    def reconstruct(
        self, params: Params, image: UInt8[Array, "batch height width 3"], mask: PatchMask
    ) -> Float[Array, "batch views height width 3"]:
        """Makes three views: the visible patches on grey, the reconstruction, and the image.

        Values are in [0, 1]. If the model predicts normalized pixels, each predicted patch gets the
        mean and standard deviation of the true patch, as in the figures of the paper.
        """
        prediction = self.model.apply({"params": params}, image, mask)
        targets = self.model.targets(image)
        if self.normalize_targets:
            mean, std = patch_statistics(targets)
            prediction = prediction * std + mean
        std, mean = (jnp.asarray(x) for x in (self.model.pixels.std, self.model.pixels.mean))
        size = self.model.image.patch_size
        hidden = mask.hidden[:, :, None, None, None]

        def pixels(x: Array) -> Array:
            return x.reshape(*x.shape[:2], size, size, 3) * std + mean

        true, painted = pixels(targets), pixels(prediction)
        views = (
            # 0.5 is grey: pixels are no longer normalized here.
            jnp.where(hidden, 0.5, true),
            jnp.where(hidden, jnp.clip(painted, 0, 1), true),
            true,
        )
        return jnp.stack([unpatchify(view, self.model.image.grid) for view in views], axis=1)


@keywords_of(make_compute)
def make_masked_autoencoding(
    *,
    image: Mapping[str, Any],
    decoder: Mapping[str, Any],
    mask_ratio: float = 0.75,
    normalize_targets: bool = True,
    image_mean: tuple[float, ...] = IMAGENET.mean,
    image_std: tuple[float, ...] = IMAGENET.std,
    **compute: Any,
) -> MaskedAutoencoding:
    """Makes the `MaskedAutoencoding` that `config.objective` describes.

    Args:
      image: arguments of `make_vit`. The defaults are as published: a class token, sin-cos
        positions and exact GELU. The pooling is always "none".
      decoder: arguments of `make_masked_decoder`.
      mask_ratio: share of the patches that are hidden.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown variant or dtype, or a mask that hides all or nothing.
    """
    how = make_compute(**compute)
    published = {"class_token": True, "position": "sincos", "activation": "gelu"}
    section, where = {**published, **image, "pooling": "none"}, "config.objective"
    vit = config_lib.build(make_vit, section, f"{where}.image", compute=how)
    if kept_patches(vit.patches, mask_ratio) == vit.patches:
        raise ValueError(f"mask_ratio {mask_ratio} hides none of the {vit.patches} patches")
    more = {"image": vit, "compute": how}
    painter = config_lib.build(make_masked_decoder, decoder, f"{where}.decoder", **more)
    model = MaskedAutoencoder(vit, painter, Pixels(tuple(image_mean), tuple(image_std)))
    return MaskedAutoencoding(model, mask_ratio, normalize_targets)

"""Contrastive pretraining of two towers: CLIP's softmax, SigLIP's sigmoid, FLIP's masks."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from vlp_jax import config as config_lib
from vlp_jax.errors import did_you_mean
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder, make_dual_encoder
from vlp_jax.models.masking import kept_patches, random_mask
from vlp_jax.models.text import make_text
from vlp_jax.models.values import Pixels, check_choice, keywords_of
from vlp_jax.models.vit import make_vit
from vlp_jax.objectives.base import (
    Batch,
    Context,
    Examples,
    Field,
    Function,
    LossOutput,
    Objective,
    Params,
    of_images,
    of_texts,
)
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.objectives.compute import from_tokenizer, make_compute
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES, pair_logits

LOSS_FORMS = ("plain", "blocked")


@dataclasses.dataclass(frozen=True)
class Contrastive(Objective):
    """Matches the images of the global batch with its texts.

    Attributes:
      model: the image tower and the text tower.
      pairwise_loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
      max_logit_scale: upper bound of the factor on the cosine similarity; 0 for no bound.
      mask_ratio: share of each image's patches that are dropped in training (Li et al. 2023,
        "FLIP"); evaluation keeps all patches.
      loss_form: "plain" (a device computes all logits of its images at once) or "blocked" (see
        `blocked_loss`: memory does not grow with the devices). Both compute the same loss.
      loss_block_size: images of a device whose logits the blocked form holds at once.
    """

    model: DualEncoder | CoCa
    pairwise_loss: str
    max_logit_scale: float
    mask_ratio: float = 0.0
    loss_form: str = "plain"
    loss_block_size: int = 256

    @property
    def reads(self) -> dict[str, Field]:
        """The fields of the loss: an image and its text."""
        image, text = self.model.image, self.model.text
        return {"image": Field.pixels(image.image_size), "text": Field.tokens(text.context_length)}

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Returns images and texts, and in training with `mask_ratio` the patches to keep."""
        fields = {name: batch[name] for name in self.reads}
        if context.train and self.mask_ratio:
            # `forward` takes the other half: masks and stochastic depth are independent.
            key, patches = jax.random.split(context.rng)[0], self.model.image.patches
            kept = kept_patches(patches, self.mask_ratio)
            fields["keep"] = random_mask(key, len(batch["image"]), patches, kept).keep
        return fields

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes the embeddings of images and texts."""
        rngs = {"drop_path": jax.random.split(context.rng)[1]}
        out = self.model.apply({"params": params}, **batch, train=context.train, rngs=rngs)
        return {name: out[name] for name in ("image", "text")}

    def reduce(
        self, params: Params, examples: Examples, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """Computes the pairwise loss over the global batch; "blocked" needs a mesh (ValueError)."""
        del context
        scale, bias = self._scale_and_bias(params)
        loss, hits = self._pair_loss(examples["image"], examples["text"], scale, bias)
        count, one = jnp.float32(len(examples["image"])), jnp.float32(1)
        metrics = {
            # A metric is a sum with its count, and the loss is a mean over pairs.
            "loss": (loss * count, count),
            "batch_accuracy": (hits, count),
            "logit_scale": (scale, one),
            "logit_bias": (bias, one),
        }
        return loss, LossOutput(metrics)

    def _pair_loss(
        self, image: Array, text: Array, scale: Array, bias: Array
    ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Computes the loss, and the number of images whose text has the highest logit."""
        if self.loss_form == "blocked":
            mesh = jax.sharding.get_abstract_mesh()
            if mesh.empty:
                raise ValueError(
                    "loss_form 'blocked' needs a mesh, also on one device: call the loss inside "
                    "vlp_jax.parallel.rules.use_mesh(mesh), or set loss_form to 'plain'"
                )
            settings = {"mesh": mesh, "block_size": self.loss_block_size}
            return blocked_loss(self.pairwise_loss, image, text, scale, bias, **settings)
        logits = pair_logits(image, text, scale, bias)
        hits = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
        return PAIRWISE_LOSSES[self.pairwise_loss](logits), hits.sum().astype(jnp.float32)

    def _scale_and_bias(self, params: Params) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Returns the bounded factor on the cosine similarity, and the bias of the logits."""
        log_scale, bias = self.model.apply({"params": params}, method="logit_parameters")
        bound = math.log(self.max_logit_scale) if self.max_logit_scale else math.inf
        return jnp.exp(bound_above(log_scale, bound)), bias

    def functions(self) -> dict[str, Function]:
        """Returns the functions of a dual encoder.

        - `embed_image` (uint8 images) and `embed_text` (token ids): unit vectors.
        - `image_features` (uint8 images): the pooled output of the tower, before the projection.
        - `logit_scale` (its array is ignored): the factor on the cosine similarity, with the bound
          that training applies.
        """

        def apply(method: str) -> Callable[..., Array]:
            return lambda params, x: self.model.apply({"params": params}, x, method=method)

        unit = "unit vectors"
        return {
            "embed_image": of_images(apply("embed_image"), unit),
            "embed_text": of_texts(apply("embed_text"), unit),
            "image_features": of_images(apply("image_features"), "features before the projection"),
            "logit_scale": Function(
                lambda params, _: self._scale_and_bias(params)[0],
                {},
                "the factor on the cosine similarity",
            ),
        }


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def bound_above(x: Float[Array, ""], bound: float) -> Float[Array, ""]:
    """Computes min(x, bound). Above the bound, only gradients that lower `x` pass.

    CLIP clips the parameter itself after each update ("clipped to prevent scaling the logits by
    more than 100", Radford et al. 2021, 2.5). A bound in the loss needs no rule for one parameter.
    """
    return jnp.minimum(x, bound)


def _bound_above_forward(x: ArrayLike, bound: float) -> tuple[Array, ArrayLike]:
    return jnp.minimum(x, bound), x


def _bound_above_backward(bound: float, x: ArrayLike, gradient: Array) -> tuple[Array]:
    # Gradient descent subtracts, so a positive gradient lowers x. The true gradient is 0 above the
    # bound, where x could never come back.
    return (jnp.where(x > bound, jnp.maximum(gradient, 0), gradient),)


bound_above.defvjp(_bound_above_forward, _bound_above_backward)


def check_loss(loss: str, form: str, block_size: int, scale: float | None, most: float) -> None:
    """Raises ValueError for settings of `make_contrastive` that are unknown or out of range."""
    if loss not in PAIRWISE_LOSSES:  # people type "siglip"
        raise ValueError(f"unknown loss {loss!r}{did_you_mean(loss, PAIRWISE_LOSSES)}")
    check_choice("loss_form", form, LOSS_FORMS)
    if block_size < 1:
        raise ValueError(f"loss_block_size must be at least 1, not {block_size}")
    if scale is not None and scale <= 0:
        raise ValueError(f"logit_scale_init must be > 0, not {scale}")
    if most < 0:
        raise ValueError(f"max_logit_scale must be >= 0 (0 for no bound), not {most}")


@keywords_of(make_compute)
def make_contrastive(
    *,
    tokenizer: Any,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    embed_dim: int,
    image_head: str = "linear",
    text_head: str = "linear",
    loss: str = "softmax",
    mask_ratio: float = 0.0,
    loss_form: str = "plain",
    loss_block_size: int = 256,
    logit_scale_init: float | None = None,
    logit_bias_init: float | None = None,
    max_logit_scale: float = 100.0,
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    **compute: Any,
) -> Contrastive:
    """Makes the `Contrastive` that `config.objective` describes.

    Args:
      tokenizer: gives the text tower its vocabulary and context length.
      image, text: arguments of `make_vit` and `make_text`.
      image_head, text_head: see `DualEncoder`.
      loss: "softmax" (CLIP) or "sigmoid" (SigLIP).
      mask_ratio, loss_form, loss_block_size: see `Contrastive`.
      logit_scale_init: default 1 / 0.07 (CLIP) for softmax, 10 (SigLIP, alg. 1) for sigmoid.
      logit_bias_init: default none for softmax, -10 (SigLIP, alg. 1) for sigmoid.
      compute: see `make_compute`.

    Raises:
      ValueError: an unknown loss, form, dtype, variant or pooling, or a block size below 1.
    """
    check_loss(loss, loss_form, loss_block_size, logit_scale_init, max_logit_scale)
    how = make_compute(**compute)
    defaults = {"softmax": (1 / 0.07, None), "sigmoid": (10.0, -10.0)}[loss]
    scale = defaults[0] if logit_scale_init is None else logit_scale_init
    bias = defaults[1] if logit_bias_init is None else logit_bias_init
    sizes = from_tokenizer(tokenizer, "a contrastive objective")
    model = make_dual_encoder(
        image=config_lib.build(make_vit, image, "config.objective.image", compute=how),
        text=config_lib.build(make_text, text, "config.objective.text", compute=how, **sizes),
        embed_dim=embed_dim,
        image_head=image_head,
        text_head=text_head,
        logit_scale_init=math.log(scale),
        logit_bias_init=bias,
        pixels=Pixels(tuple(image_mean), tuple(image_std)),
    )
    kept_patches(model.image.patches, mask_ratio)  # raises if the ratio leaves no patch
    return Contrastive(model, loss, max_logit_scale, mask_ratio, loss_form, loss_block_size)

"""open_clip's model of the sizes of a contrastive objective, with open_clip's losses."""

from __future__ import annotations

import math
import warnings
from typing import Any

from tools.perf.peers.timm_peer import timm_arguments
from tools.perf.peers.torch_step import Recipe
from vlp_jax.interop.base import Extras
from vlp_jax.interop.open_clip import text_config
from vlp_jax.interop.open_clip_common import native_config
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.objectives import Objective
from vlp_jax.objectives.contrastive import Contrastive

TEXT_POOLINGS = ("eos", "argmax", "first", "last")


def refusal(objective: Objective) -> str | None:
    """Returns why open_clip has no model for `objective`; None if it has."""
    if not isinstance(objective, Contrastive):
        return f"it trains image with text, not {type(objective).__name__}"
    model = objective.model
    if model.text.pooling not in TEXT_POOLINGS or model.text.padding_mask:
        return "its text tower has neither a mean nor an attention pooling, and no padding mask"
    if model.image.registers or (model.image.class_token and model.image.pooling == "map"):
        return "its image tower has no registers, and no class token beside an attention pooling"
    return None


def recipe(objective: Contrastive) -> Recipe:
    """Returns the model and its loss.

    A tower with a class token is open_clip's own; one without is timm's Vision Transformer, as in
    open_clip's SigLIP.
    """
    model = objective.model
    notes = []
    if model.image.class_token and model.image.patch_bias:
        notes.append("the projection of patches has no bias")
    if model.image.position != "learned":
        notes.append("positions are learned")
    if objective.loss_form != "plain":
        notes.append("the loss holds all logits of the batch at once")

    def after_step(module: Any) -> None:
        if objective.max_logit_scale:
            # open_clip's training clips the parameter after each step; ours bounds it in the loss.
            module.logit_scale.clamp_(0, math.log(objective.max_logit_scale))

    return Recipe(
        build=lambda: _build(model, objective.mask_ratio),
        loss=_loss(objective.pairwise_loss),
        notes=tuple(notes),
        after_step=after_step,
    )


def _build(model: DualEncoder, mask_ratio: float) -> Any:
    import open_clip

    image = model.image
    if image.class_token:
        vision = native_config(image) | {"patch_dropout": mask_ratio}
    else:
        # timm's names for the poolings that need no class token.
        pool = {"mean": "avg", "map": "map"}[image.pooling]
        # open_clip names the pooling after a model with a projection is made, and timm's own
        # default needs a class token.
        _register_timm(timm_arguments(image) | {"global_pool": pool}, mask_ratio)
        vision = {
            "image_size": image.image_size[0],
            "timm_model_name": _NAME,
            "timm_model_pretrained": False,
            "timm_pool": pool,
            "timm_proj": "none" if model.image_head == "none" else "linear",
            "timm_proj_bias": model.image_head == "linear_bias",
        }
    return open_clip.CustomTextCLIP(
        embed_dim=model.embed_dim,
        vision_cfg=vision,
        text_cfg=text_config(model, Extras(), ""),
        quick_gelu=model.text.transformer.activation == "quick_gelu",
        init_logit_scale=model.logit_scale_init,
        init_logit_bias=model.logit_bias_init,
    )


_NAME = "vit_of_the_step_benchmark"


def _register_timm(arguments: dict[str, Any], mask_ratio: float) -> None:
    """Gives timm a model of any sizes under `_NAME`: open_clip takes towers by name alone."""
    import timm

    def make(pretrained: bool = False, **more: Any) -> Any:
        del pretrained
        for key in ("cache_dir", "pretrained_cfg", "pretrained_cfg_overlay"):
            more.pop(key, None)
        model = timm.models.VisionTransformer(
            **{**arguments, "patch_drop_rate": mask_ratio, **more}
        )
        model.default_cfg = {}  # open_clip reads it of a model with a projection
        return model

    make.__name__ = _NAME
    make.__module__ = timm.models.vision_transformer.__name__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it overwrites the one before
        timm.models.register_model(make)


def _loss(pairwise_loss: str) -> Any:
    def loss(module: Any, batch: Any) -> Any:
        import open_clip

        image, text, scale, *bias = module(batch["image"], batch["text"])
        if pairwise_loss == "sigmoid":
            return open_clip.loss.SigLipLoss()(image, text, scale, *bias)
        return open_clip.loss.ClipLoss()(image, text, scale)

    return loss

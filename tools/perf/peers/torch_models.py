"""Models of other projects in PyTorch of the sizes of our objectives, with their losses."""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

from tools.perf.peers.torch_step import Recipe
from vlp_jax.interop.base import Extras
from vlp_jax.interop.open_clip import text_config
from vlp_jax.interop.open_clip_common import native_config
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives import Objective
from vlp_jax.objectives.classification import Classification
from vlp_jax.objectives.contrastive import Contrastive
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding

TEXT_POOLINGS = ("eos", "argmax", "first", "last")


def refuse_open_clip(objective: Objective) -> str | None:
    """Returns why open_clip has no model for `objective`; None if it has."""
    if not isinstance(objective, Contrastive):
        return f"it trains image with text, not {type(objective).__name__}"
    model = objective.model
    if model.text.pooling not in TEXT_POOLINGS or model.text.padding_mask:
        return "its text tower has neither a mean nor an attention pooling, and no padding mask"
    if model.image.registers or (model.image.class_token and model.image.pooling == "map"):
        return "its image tower has no registers, and no class token beside an attention pooling"
    return None


def open_clip_recipe(objective: Contrastive) -> Recipe:
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
        build=lambda: _build_open_clip(model, objective.mask_ratio),
        loss=_open_clip_loss(objective.pairwise_loss),
        notes=tuple(notes),
        after_step=after_step,
    )


def _build_open_clip(model: DualEncoder, mask_ratio: float) -> Any:
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


def _open_clip_loss(pairwise_loss: str) -> Any:
    def loss(module: Any, batch: Any) -> Any:
        import open_clip

        image, text, scale, *bias = module(batch["image"], batch["text"])
        if pairwise_loss == "sigmoid":
            return open_clip.loss.SigLipLoss()(image, text, scale, *bias)
        return open_clip.loss.ClipLoss()(image, text, scale)

    return loss


TIMM_POOLINGS = {"cls": "token", "mean": "avg", "map": "map"}


def timm_recipe(objective: Classification) -> Recipe:
    """Returns the model and its loss, the cross-entropy."""
    image = objective.model.image
    # Ours by size, timm's by code: initialization and kernels are its own.
    arguments = timm_arguments(image) | {
        "num_classes": objective.model.classes,
        "global_pool": TIMM_POOLINGS[image.pooling],
    }
    notes = [] if objective.class_loss == "softmax" else ["its loss is the softmax cross-entropy"]
    if image.position != "learned":
        notes.append("positions are learned")

    def build() -> Any:
        import timm

        return timm.models.VisionTransformer(**arguments)

    def loss(module: Any, batch: Any) -> Any:
        import torch

        scores = module(batch["image"])
        return torch.nn.functional.cross_entropy(
            scores, batch[objective.label_field], label_smoothing=objective.label_smoothing
        )

    activation = objective.model.image.transformer.activation
    if activation not in ("gelu", "gelu_tanh"):
        notes.append(f"its activation is gelu, ours {activation}")
    return Recipe(build, loss, tuple(notes))


def timm_arguments(image: VisionTransformer) -> dict[str, Any]:
    """Returns arguments of timm's VisionTransformer for the sizes and the form of our tower."""
    import torch

    # timm's default is the exact GELU; SigLIP's is the tanh form.
    activation = functools.partial(torch.nn.GELU, approximate="tanh")
    layers = image.transformer
    return {
        "img_size": image.image_size,
        "patch_size": image.patch_size,
        "embed_dim": image.width,
        "depth": layers.depth,
        "num_heads": layers.heads,
        "mlp_ratio": layers.mlp_dim / image.width,
        "class_token": image.class_token,
        "reg_tokens": image.registers,
        "no_embed_class": not image.class_position,
        "pre_norm": image.pre_norm,
        "qk_norm": layers.qk_norm,
        "init_values": layers.layer_scale,
        "drop_path_rate": layers.stochastic_depth,
        "fc_norm": image.norm_after_pool,
        "act_layer": activation if layers.activation == "gelu_tanh" else torch.nn.GELU,
        "norm_layer": functools.partial(torch.nn.LayerNorm, eps=layers.norm_eps),
    }


def transformers_recipe(objective: MaskedAutoencoding) -> Recipe:
    """Returns the model and the loss that comes with it."""
    model = objective.model
    image, layers, painter = model.image, model.image.transformer, model.decoder.transformer
    fields = {
        "hidden_size": layers.width,
        "num_hidden_layers": layers.depth,
        "num_attention_heads": layers.heads,
        "intermediate_size": layers.mlp_dim,
        "image_size": image.image_size[0],
        "patch_size": image.patch_size,
        "layer_norm_eps": layers.norm_eps,
        "hidden_act": "gelu" if layers.activation == "gelu" else "gelu_pytorch_tanh",
        "decoder_hidden_size": painter.width,
        "decoder_num_hidden_layers": painter.depth,
        "decoder_num_attention_heads": painter.heads,
        "decoder_intermediate_size": painter.mlp_dim,
        "mask_ratio": objective.mask_ratio,
        "norm_pix_loss": objective.normalize_targets,
        # Its eager attention would hold all weights and be no fair peer.
        "attn_implementation": "sdpa",
    }

    def build() -> Any:
        import transformers

        return transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**fields))

    def loss(module: Any, batch: Any) -> Any:
        return module(pixel_values=batch["image"]).loss

    notes = [
        "it embeds all patches and then drops the hidden ones, and also predicts for its token"
    ]
    if not image.class_token:
        notes.append("its encoder has a class token")
    return Recipe(build, loss, tuple(notes))


def refuse_timm(objective: Objective) -> str | None:
    """Returns why timm has no model for `objective`; None if it has."""
    if isinstance(objective, Classification):
        return None
    return f"it classifies images, and does not do {type(objective).__name__}"


def refuse_transformers(objective: Objective) -> str | None:
    """Returns why transformers has no model for `objective`; None if it has."""
    if isinstance(objective, MaskedAutoencoding):
        return None
    return f"its ViTMAEForPreTraining does masked autoencoding, not {type(objective).__name__}"


@dataclasses.dataclass(frozen=True)
class TorchPeer:
    """Another project's model for the sizes of our objective.

    Attributes:
      package: what has to be installed.
      refusal: None, or why it has no model of this kind.
      recipe: the model with its loss.
    """

    package: str
    refusal: Callable[[Objective], str | None]
    recipe: Callable[[Any], Recipe]


TORCH_PEERS = {
    "open_clip": TorchPeer("open_clip", refuse_open_clip, open_clip_recipe),
    "timm": TorchPeer("timm", refuse_timm, timm_recipe),
    "transformers": TorchPeer("transformers", refuse_transformers, transformers_recipe),
}

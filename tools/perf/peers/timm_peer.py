"""timm's Vision Transformer of the sizes of a classification objective."""

from __future__ import annotations

from typing import Any

from tools.perf.peers.torch_step import Recipe
from vlp_jax.models.vit import VisionTransformer
from vlp_jax.objectives import Objective
from vlp_jax.objectives.classification import Classification

POOLINGS = {"cls": "token", "mean": "avg", "map": "map"}


def refusal(objective: Objective) -> str | None:
    """Returns why timm has no model for `objective`; None if it has."""
    if not isinstance(objective, Classification):
        return f"it classifies images, and does not do {type(objective).__name__}"
    return None


def recipe(objective: Classification) -> Recipe:
    """Returns the model and its loss, the cross-entropy."""
    image = objective.model.image
    # Ours by size, timm's by code: initialization and kernels are its own.
    arguments = timm_arguments(image) | {
        "num_classes": objective.model.classes,
        "global_pool": POOLINGS[image.pooling],
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
    import functools

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

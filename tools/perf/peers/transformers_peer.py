"""The masked autoencoder of transformers, `ViTMAEForPreTraining`, of the sizes of ours."""

from __future__ import annotations

from typing import Any

from tools.perf.peers.torch_step import Recipe
from vlp_jax.objectives import Objective
from vlp_jax.objectives.masked_autoencoding import MaskedAutoencoding


def refusal(objective: Objective) -> str | None:
    """Returns why transformers has no model for `objective`; None if it has."""
    if not isinstance(objective, MaskedAutoencoding):
        return f"its ViTMAEForPreTraining does masked autoencoding, not {type(objective).__name__}"
    return None


def recipe(objective: MaskedAutoencoding) -> Recipe:
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

        config = transformers.ViTMAEConfig(**fields)
        return transformers.ViTMAEForPreTraining(config)

    def loss(module: Any, batch: Any) -> Any:
        return module(pixel_values=batch["image"]).loss

    notes = [
        "it embeds all patches and then drops the hidden ones, and also predicts for its token"
    ]
    if not image.class_token:
        notes.append("its encoder has a class token")
    return Recipe(build, loss, tuple(notes))

"""The recipes in configs/ are as large as the models of transformers that they are exported to."""

import pytest
import torch
import transformers
from recipe_shapes import count, load, objective_of, shapes_of


def clip_sizes(patch, image=(768, 12, 12), text=(512, 12, 8), projection=512):
    def section(width, depth, heads):
        return {
            "hidden_size": width,
            "num_hidden_layers": depth,
            "num_attention_heads": heads,
            "intermediate_size": 4 * width,
        }

    return {
        "vision_config": {**section(*image), "patch_size": patch},
        "text_config": section(*text),
        "projection_dim": projection,
    }


def so400m_sizes(size, context_length):
    section = {
        "hidden_size": 1152,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "intermediate_size": 4304,
    }
    return {
        "vision_config": {**section, "patch_size": 14, "image_size": size},
        "text_config": {**section, "max_position_embeddings": context_length},
    }


def g_opt_sizes():
    """As the library has them in models/siglip/convert_siglip_to_hf.py."""
    text = {**so400m_sizes(224, 64)["text_config"], "vocab_size": 256_000, "projection_size": 1536}
    vision = {
        "hidden_size": 1536,
        "num_hidden_layers": 40,
        "num_attention_heads": 16,
        "intermediate_size": 6144,
        "patch_size": 16,
        "image_size": 256,
    }
    return {"vision_config": vision, "text_config": text}


def vit_mae_sizes(width, depth, heads, patch):
    return {
        "hidden_size": width,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "patch_size": patch,
    }


# Sizes in the config.json of the published models: openai/clip-vit-*, google/siglip-*,
# facebook/vit-mae-*. What is not there is the default of the library.
PUBLISHED = {
    "clip_b16": ("CLIP", clip_sizes(16)),
    "clip_b32": ("CLIP", clip_sizes(32)),
    "clip_l14": ("CLIP", clip_sizes(14, (1024, 24, 16), (768, 12, 12), 768)),
    "siglip_b16": ("Siglip", {}),
    "siglip_so400m14": ("Siglip", so400m_sizes(224, 16)),
    "siglip_so400m14:378": ("Siglip", so400m_sizes(384, 64)),
    "siglip_g": ("Siglip", g_opt_sizes()),
    "mae_b16": ("ViTMAE", vit_mae_sizes(768, 12, 12, 16)),
    "mae_l16": ("ViTMAE", vit_mae_sizes(1024, 24, 16, 16)),
    "mae_h14": ("ViTMAE", vit_mae_sizes(1280, 32, 16, 14)),
}


@pytest.mark.parametrize("spec", PUBLISHED)
def test_parameters_are_as_many_as_in_transformers(spec):
    family, sizes = PUBLISHED[spec]
    model = family + ("ForPreTraining" if family == "ViTMAE" else "Model")
    with torch.device("meta"):
        theirs = getattr(transformers, model)(getattr(transformers, f"{family}Config")(**sizes))
    config = load(spec)
    ours = count(shapes_of(config))
    if family == "ViTMAE":  # it keeps both tables of sines and cosines, a row of a class token too
        objective = objective_of(config)
        tokens = objective.model.image.tokens
        ours += tokens * (objective.model.image.width + objective.model.decoder.transformer.width)
    assert ours == sum(parameter.numel() for parameter in theirs.parameters())


def test_parameters_are_as_many_as_in_open_clips_coca():
    from open_clip.coca_model import CoCa
    from open_clip.factory import get_model_config

    sizes = get_model_config("coca_ViT-B-32")
    sizes.pop("custom_text")
    with torch.device("meta"):
        theirs = CoCa(**sizes)
    ours = count(shapes_of(load("coca_b32")))
    assert ours == sum(parameter.numel() for parameter in theirs.parameters())

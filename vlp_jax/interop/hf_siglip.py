"""Hugging Face `SiglipModel`: config.json, model.safetensors, preprocessor_config.json.

Source: transformers, models/siglip/modeling_siglip.py and configuration_siglip.py. Checkpoints of
SigLIP 2 with a fixed resolution have this class too; NaFlex checkpoints ("siglip2") do not. The
projection to queries, keys and values is one tensor in the image tower's head, and three tensors in
every encoder. Texts are pooled at the last position, padding or not.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_common, hf_images, hf_tokenizer
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.hf_clip import text_ids
from vlp_jax.interop.tables import (
    BATCHED,
    SCALAR,
    Entry,
    Table,
    convolution,
    from_theirs,
    fused,
    heads_out,
    linear,
    norm,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.vit import VisionTransformer

MODEL = "SiglipModel"
KINDS = (DualEncoder,)
LOADED_BY = 'transformers.SiglipModel.from_pretrained("{}")'
HOLDS = ("float32", "bfloat16")

TABLE: Table = [
    Entry("logit_scale", "logit_scale", SCALAR),
    Entry("logit_bias", "logit_bias", SCALAR),
    *convolution("image/patch_embedding/projection", "vision_model.embeddings.patch_embedding"),
    Entry("image/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *hf_common.layers_as_in_clip("image/encoder/layers", "vision_model.encoder.layers.{i}"),
    *norm("image/encoder/norm", "vision_model.post_layernorm"),
    Entry("image/pooling/probe", "vision_model.head.probe", BATCHED),
    *fused(
        "image/pooling/attention",
        ("query", "key", "value"),
        "vision_model.head.attention.in_proj_weight",
        "vision_model.head.attention.in_proj_bias",
    ),
    *heads_out("image/pooling/attention/out", "vision_model.head.attention.out_proj"),
    *norm("image/pooling/norm", "vision_model.head.layernorm"),
    *linear("image/pooling/mlp/up", "vision_model.head.mlp.fc1"),
    *linear("image/pooling/mlp/down", "vision_model.head.mlp.fc2"),
    Entry("text/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
    Entry("text/position_embedding", "text_model.embeddings.position_embedding.weight"),
    *hf_common.layers_as_in_clip("text/encoder/layers", "text_model.encoder.layers.{i}"),
    *norm("text/encoder/norm", "text_model.final_layer_norm"),
    *linear("text_projection", "text_model.head"),
]
# Position ids are the numbers 0, 1, 2, ..., which old versions saved as a buffer.
IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)

# Defaults of SiglipVisionConfig and SiglipTextConfig: a config.json may omit them.
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "vision_use_head": True,
}
TEXT_DEFAULTS = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 64,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "pad_token_id": 1,
    "eos_token_id": 49407,
}
# No attention_mask: padding is pooled and seen like every token.
TOKENIZER_GIVES = ("input_ids",)
LOGIT_SCALE_INIT, LOGIT_BIAS_INIT = math.log(10), -10.0  # Zhai et al. 2023, 3.2

# Values of our fields that the class can express.
IMAGE_HAS = {
    "pooling": ("map",),
    "class_token": (False,),
    "registers": (0,),
    "patch_bias": (True,),
    "pre_norm": (False,),
    "norm_after_pool": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
TEXT_HAS = {
    "causal": (False,),
    "pooling": ("last",),
    "padding_mask": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
WHOLE_HAS = {"image_head": ("none",), "text_head": ("linear_bias", "linear")}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder or its file of weights.

    Raises:
      UserError: the files hold no SiglipModel that can be expressed here.
    """
    weights, config = hf_common.open_folder(path, "siglip")
    where, notes = weights.parent / "config.json", []
    text = hf_common.section(config, "text_config", TEXT_DEFAULTS, where)
    vision = hf_common.section(config, "vision_config", VISION_DEFAULTS, where)
    image = _image(vision, where, notes)
    size = base.pair(vision["image_size"], "image_size", where)
    processing = hf_images.read(weights.parent, "Siglip", size, like, notes)
    module = DualEncoder(
        image=image,
        text=base.tower(
            TextTransformer,
            where,
            vocab_size=base.integer(text, "vocab_size", where),
            context_length=base.integer(text, "max_position_embeddings", where),
            causal=False,
            pooling="last",
            eos_id=hf_common.token_id(text, "eos_token_id"),
            pad_id=hf_common.token_id(text, "pad_token_id"),
            **hf_common.encoder_fields(text, where),
        ),
        embed_dim=image.width,
        logit_scale_init=LOGIT_SCALE_INIT,
        logit_bias_init=LOGIT_BIAS_INIT,
        image_head="none",
        text_head="linear_bias",
        pixels=hf_images.normalization(processing),
    )
    tensors = files.load_tensors(weights)
    params = from_theirs(TABLE, tensors, expected_shapes(module), weights, IGNORED)
    extras = processing | hf_common.read_texts(weights.parent, text, "SiglipTokenizer")
    return Imported(module, params, notes, extras)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that a SiglipModel cannot express.

    A text head or logits without a bias can be expressed: they are written with a bias of zero.
    """
    return [
        *base.requirements(MODEL, "image", module.image, IMAGE_HAS),
        *base.square_problems(MODEL, module.image),
        *base.requirements(MODEL, "text", module.text, TEXT_HAS),
        *base.requirements(MODEL, "", module, WHOLE_HAS),
        *hf_images.problems(MODEL, extras),
    ]


def write(module: DualEncoder, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder for `SiglipModel.from_pretrained`."""
    image, params = base.with_position_table(module.image, params)
    params.setdefault("logit_bias", np.zeros((), np.float32))
    params.setdefault("text_projection/bias", np.zeros(module.embed_dim, np.float32))
    config = {
        "architectures": [MODEL],
        "model_type": "siglip",
        "torch_dtype": extras.weights,
        "vision_config": {
            "model_type": "siglip_vision_model",
            **hf_common.encoder_config(image),
            "image_size": image.image_size[0],
            "patch_size": image.patch_size,
            "num_channels": 3,
        },
        "text_config": {
            "model_type": "siglip_text_model",
            **hf_common.encoder_config(module.text),
            "projection_size": module.embed_dim,
            **text_ids(module.text, extras),
        },
    }
    return [
        files.save_json(config, directory / "config.json"),
        files.save_safetensors(
            to_theirs(TABLE, params), directory / "model.safetensors", extras.narrow
        ),
        hf_images.write(module, directory, extras, "SiglipImageProcessor"),
        *hf_tokenizer.write(extras.tokenizer, directory, TOKENIZER_GIVES),
    ]


def _image(config: dict[str, Any], where: Path, notes: list[str]) -> VisionTransformer:
    hf_common.three_channels(config, where)
    if not config["vision_use_head"]:
        raise UserError(f"{where}: vision_use_head is false: the images are not pooled")
    patch = base.one_side(config["patch_size"], "patch_size", where)
    side = base.one_side(config["image_size"], "image_size", where)
    return base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled((side, side), patch, notes),
        patch_size=patch,
        pooling="map",
        class_token=False,
        **hf_common.encoder_fields(config, where),
    )

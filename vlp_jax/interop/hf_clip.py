"""Hugging Face `CLIPModel`: config.json, model.safetensors, preprocessor_config.json.

Source: transformers, models/clip/modeling_clip.py and configuration_clip.py.

- Texts are pooled at the first `eos_token_id`. But `eos_token_id` 2, as in the first published
  configs, means pooling at the highest id.
- The norm after the image encoder is applied to the class token alone. This is the same as a norm
  of all tokens before the pooling.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_common, hf_images, hf_tokenizer
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.tables import (
    SQUEEZED,
    Entry,
    Table,
    convolution,
    from_theirs,
    linear,
    norm,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.vit import VisionTransformer

MODEL = "CLIPModel"
KINDS = (DualEncoder,)
LOADED_BY = 'transformers.CLIPModel.from_pretrained("{}")'
HOLDS = ("float32", "bfloat16")
TOKENIZER_GIVES = ("input_ids", "attention_mask")
HIGHEST_ID = 2  # the eos_token_id that means "pool at the highest id"

TABLE: Table = [
    Entry("logit_scale", "logit_scale"),
    Entry("image/class_token", "vision_model.embeddings.class_embedding", SQUEEZED),
    *convolution("image/patch_embedding/projection", "vision_model.embeddings.patch_embedding"),
    Entry("image/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    *norm("image/pre_norm", "vision_model.pre_layrnorm"),  # transformers spells it this way
    *hf_common.layers_as_in_clip("image/encoder/layers", "vision_model.encoder.layers.{i}"),
    *norm("image/encoder/norm", "vision_model.post_layernorm"),
    *norm("image/norm", "vision_model.post_layernorm"),  # with norm_after_pool
    *linear("image_projection", "visual_projection"),
    Entry("text/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
    Entry("text/position_embedding", "text_model.embeddings.position_embedding.weight"),
    *hf_common.layers_as_in_clip("text/encoder/layers", "text_model.encoder.layers.{i}"),
    *norm("text/encoder/norm", "text_model.final_layer_norm"),
    *linear("text_projection", "text_projection"),
]
# Position ids are the numbers 0, 1, 2, ..., which old versions saved as a buffer.
IGNORED = (r"(text|vision)_model\.embeddings\.position_ids",)

# Defaults of CLIPConfig, CLIPVisionConfig and CLIPTextConfig: a config.json may omit them.
# 2.6592 is ln(1 / 0.07).
DEFAULTS = {"projection_dim": 512, "logit_scale_init_value": 2.6592}
VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
TEXT_DEFAULTS = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "pad_token_id": 1,
    "eos_token_id": 49407,
}

# Values of our fields that the class can express.
IMAGE_HAS = {
    "pooling": ("cls",),
    "class_token": (True,),
    "registers": (0,),
    "patch_bias": (False,),
    "pre_norm": (True,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
TEXT_HAS = {
    "causal": (True,),
    "pooling": ("eos", "argmax"),
    "padding_mask": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
WHOLE_HAS = {"image_head": ("linear",), "text_head": ("linear",), "logit_bias_init": (None,)}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder or its file of weights.

    Raises:
      UserError: the files hold no CLIPModel that can be expressed here.
    """
    weights, config = hf_common.open_folder(path, "clip")
    where, notes = weights.parent / "config.json", []
    config = hf_common.with_defaults(config, DEFAULTS)
    text = hf_common.section(config, "text_config", TEXT_DEFAULTS, where)
    image = hf_common.section(config, "vision_config", VISION_DEFAULTS, where)
    size = base.pair(image["image_size"], "image_size", where)
    processing = hf_images.read(weights.parent, "CLIP", size, like, notes)
    module = DualEncoder(
        image=_image(image, where, like, notes),
        text=_text(text, where),
        embed_dim=base.integer(config, "projection_dim", where),
        logit_scale_init=base.number(config, "logit_scale_init_value", where),
        pixels=hf_images.normalization(processing),
    )
    tensors = files.load_tensors(weights)
    params = from_theirs(TABLE, tensors, expected_shapes(module), weights, IGNORED)
    extras = processing | hf_common.read_texts(weights.parent, text, "CLIPTokenizer")
    if module.text.pooling == "argmax":
        extras.pop("eos_id")  # a 2 that stands for the pooling, not the tokenizer's id
    return Imported(module, params, notes, extras)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that a CLIPModel cannot express."""
    problems = [
        *base.requirements(MODEL, "image", module.image, IMAGE_HAS),
        *base.square_problems(MODEL, module.image),
        *base.requirements(MODEL, "text", module.text, TEXT_HAS),
        *base.requirements(MODEL, "", module, WHOLE_HAS),
        *hf_images.problems(MODEL, extras),
    ]
    if module.text.pooling == "eos":
        if module.text.eos_id == HIGHEST_ID:
            problems.append(
                f"{MODEL} takes eos_token_id {HIGHEST_ID} for pooling at the highest id, so it "
                f"cannot pool at the first id {HIGHEST_ID}, which is this model's text.eos_id"
            )
        if extras.eos_id not in (None, module.text.eos_id):
            problems.append(
                f"eos_id {extras.eos_id} is not text.eos_id {module.text.eos_id}, at which it pools"
            )
    return problems


def write(module: DualEncoder, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder for `CLIPModel.from_pretrained`."""
    image, params = base.with_position_table(module.image, params)
    text = module.text
    config = {
        "architectures": [MODEL],
        "model_type": "clip",
        "torch_dtype": extras.weights,
        "projection_dim": module.embed_dim,
        "logit_scale_init_value": module.logit_scale_init,
        "vision_config": {
            "model_type": "clip_vision_model",
            **hf_common.encoder_config(image),
            "image_size": image.image_size[0],
            "patch_size": image.patch_size,
            "num_channels": 3,
            "projection_dim": module.embed_dim,
        },
        "text_config": {
            "model_type": "clip_text_model",
            **hf_common.encoder_config(text),
            "projection_dim": module.embed_dim,
            **text_ids(text, extras),
        },
    }
    if text.pooling == "argmax":
        config["text_config"]["eos_token_id"] = HIGHEST_ID
    return [
        files.save_json(config, directory / "config.json"),
        files.save_safetensors(
            to_theirs(TABLE, params), directory / "model.safetensors", extras.narrow
        ),
        hf_images.write(module, directory, extras, "CLIPImageProcessor"),
        *hf_tokenizer.write(extras.tokenizer, directory, TOKENIZER_GIVES),
    ]


def text_ids(text: TextTransformer, extras: Extras) -> dict[str, Any]:
    """Returns the keys of a text config that describe the tokenizer."""
    return {
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "bos_token_id": extras.bos_id,
        "eos_token_id": text.eos_id if extras.eos_id is None else extras.eos_id,
        "pad_token_id": text.pad_id if extras.pad_id is None else extras.pad_id,
    }


def _image(
    config: dict[str, Any], where: Path, like: Module | None, notes: list[str]
) -> VisionTransformer:
    hf_common.three_channels(config, where)
    patch = base.one_side(config["patch_size"], "patch_size", where)
    side = base.one_side(config["image_size"], "image_size", where)
    return base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled((side, side), patch, notes),
        patch_size=patch,
        pooling="cls",
        patch_bias=False,
        pre_norm=True,
        norm_after_pool=base.norm_after_pool_of(like),
        **hf_common.encoder_fields(config, where),
    )


def _text(config: dict[str, Any], where: Path) -> TextTransformer:
    vocab_size, eos_id = base.integer(config, "vocab_size", where), config["eos_token_id"]
    if type(eos_id) is not int:
        raise UserError(f"{where}: eos_token_id is {eos_id!r}; only one number can be read")
    highest = eos_id == HIGHEST_ID
    return base.tower(
        TextTransformer,
        where,
        vocab_size=vocab_size,
        context_length=base.integer(config, "max_position_embeddings", where),
        causal=True,
        pooling="argmax" if highest else "eos",
        # In CLIP's vocabulary the last id is the end of text.
        eos_id=vocab_size - 1 if highest else eos_id,
        pad_id=hf_common.token_id(config, "pad_token_id"),
        **hf_common.encoder_fields(config, where),
    )

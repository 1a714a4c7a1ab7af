"""Hugging Face `ViTModel`: config.json, model.safetensors, preprocessor_config.json.

Source: transformers, models/vit/modeling_vit.py and configuration_vit.py.

- Written files have no pooling layer: load them by `ViTModel.from_pretrained(path,
  add_pooling_layer=False)`. The feature is the class token of `last_hidden_state`.
- On reading, a classifier or a pooling layer is left out.
- Written names are transformers 4's, which version 5 reads too.
"""

from __future__ import annotations

import re
from pathlib import Path

from vlp_jax.interop import base, files, hf_common, hf_images
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.tables import (
    BATCHED,
    Entry,
    Table,
    convolution,
    from_theirs,
    norm,
    shorten,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.vit import VisionTransformer

MODEL = "ViTModel"
KINDS = (VisionTransformer,)
LOADED_BY = 'transformers.ViTModel.from_pretrained("{}", add_pooling_layer=False)'
HOLDS = ("float32", "bfloat16")

TABLE: Table = [
    Entry("image/class_token", "embeddings.cls_token", BATCHED),
    Entry("image/position_embedding", "embeddings.position_embeddings", BATCHED),
    *convolution("image/patch_embedding/projection", "embeddings.patch_embeddings.projection"),
    *hf_common.layers_as_in_vit("image/encoder/layers", "encoder.layer.{i}"),
    *norm("image/encoder/norm", "layernorm"),
    *norm("image/norm", "layernorm"),  # with norm_after_pool
]
LEFT_OUT = re.compile(r"pooler\..*|classifier\..*|decoder\..*|embeddings\.mask_token")

# Names in transformers 5 -> names in transformers 4.
RENAMED = (
    (r"^layers\.", "encoder.layer."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

# Defaults of ViTConfig: a config.json may omit them.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "image_size": 224,
    "patch_size": 16,
    "num_channels": 3,
    "qkv_bias": True,
}

# Values of our fields that the class can express.
IMAGE_HAS = {
    "pooling": ("cls", "none"),
    "class_token": (True,),
    "registers": (0,),
    "patch_bias": (True,),
    "pre_norm": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder or its file of weights; the tower is pooled at the class token.

    Raises:
      UserError: the files hold no ViTModel that can be expressed here.
    """
    weights, config = hf_common.open_folder(path, "vit")
    where, notes = weights.parent / "config.json", []
    config = hf_common.with_defaults(config, DEFAULTS)
    hf_common.three_channels(config, where)
    hf_common.biased_attention(config, where)
    patch = base.one_side(config["patch_size"], "patch_size", where)
    size = base.pair(config["image_size"], "image_size", where)
    module = base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled(size, patch, notes),
        patch_size=patch,
        pooling="cls",
        norm_after_pool=base.norm_after_pool_of(like),
        **hf_common.encoder_fields(config, where),
    )
    extras = hf_images.read(weights.parent, "ViT", size, like, notes)
    notes.append(
        f"images are normalized with mean {extras['image_mean']}, std {extras['image_std']}"
    )
    tensors = _names_of_4(files.load_tensors(weights), notes)
    params = from_theirs(TABLE, tensors, expected_shapes(module), weights)
    return Imported(module, params, notes, extras)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that a ViTModel cannot express."""
    return [
        *base.requirements(MODEL, "image", module, IMAGE_HAS),
        *hf_images.problems(MODEL, extras),
    ]


def write(module: VisionTransformer, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder for `ViTModel.from_pretrained`."""
    image, params = base.with_position_table(module, params)
    height, width = image.image_size
    config = {
        "architectures": [MODEL],
        "model_type": "vit",
        "torch_dtype": extras.weights,
        **hf_common.encoder_config(image),
        "image_size": height if height == width else [height, width],
        "patch_size": image.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
    }
    return [
        files.save_json(config, directory / "config.json"),
        files.save_safetensors(
            to_theirs(TABLE, params), directory / "model.safetensors", extras.narrow
        ),
        hf_images.write(module, directory, extras, "ViTImageProcessor"),
    ]


def _names_of_4(tensors: Tensors, notes: list[str]) -> Tensors:
    renamed, left_out = {}, []
    for key, x in tensors.items():
        name = key.removeprefix("vit.")  # the prefix of ViTForImageClassification
        for pattern, name_of_4 in RENAMED:
            name = re.sub(pattern, name_of_4, name)
        if LEFT_OUT.fullmatch(name):
            left_out.append(key)
        else:
            renamed[name] = x
    if left_out:
        notes.append(
            f"left out, since the tower has no place for them: {shorten(sorted(left_out))}"
        )
    return renamed

"""Helpers for the formats of Hugging Face `transformers`: folders, configs, special tokens, layers.

A config.json holds only differences from the defaults of its class. So the defaults are part of a
format; they are taken from transformers 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_images, hf_tokenizer
from vlp_jax.interop.base import Extras
from vlp_jax.interop.trees import Module
from vlp_jax.models.vit import VisionTransformer

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HOLDS = ("float32", "bfloat16")

# Our name -> the name in `transformers.activations.ACT2FN`.
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_OTHER_NAMES = {"gelu_new": "gelu_tanh", "gelu_python": "gelu"}  # other names, the same functions
# Our field -> its key in the config of every encoder.
_SIZES = {
    "width": "hidden_size",
    "depth": "num_hidden_layers",
    "mlp_dim": "intermediate_size",
    "heads": "num_attention_heads",
}


# Our modules in the layers of an encoder -> the names in CLIPModel and SiglipModel.
CLIP_LAYERS = {
    "norm_attention": "layer_norm1",
    "attention/query": "self_attn.q_proj",
    "attention/key": "self_attn.k_proj",
    "attention/value": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "norm_mlp": "layer_norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
# The same -> the names in ViTModel and ViTMAEModel of transformers 4.
VIT_LAYERS = {
    "norm_attention": "layernorm_before",
    "attention/query": "attention.attention.query",
    "attention/key": "attention.attention.key",
    "attention/value": "attention.attention.value",
    "attention/out": "attention.output.dense",
    "norm_mlp": "layernorm_after",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}


def open_folder(
    path: Path, model_type: str, defaults: Mapping[str, Any]
) -> tuple[Path, Path, dict[str, Any]]:
    """Returns the file of weights, the file of its config, and the config with its defaults."""
    weights = files.find_weights(path, WEIGHTS)
    file = weights.parent / "config.json"
    if not file.is_file():
        raise UserError(f"{weights} needs its config.json beside it, and there is none")
    config = files.load_json(file)
    actual = config.get("model_type")
    if actual != model_type:
        raise UserError(f"{file} has model_type {actual!r}, and this format is {model_type!r}")
    return weights, file, {**defaults, **config}


def write_folder(
    head: tuple[str, str],
    config: Mapping[str, Any],
    tensors: files.Tensors,
    module: Module,
    directory: Path,
    extras: Extras,
    processor: str,
    tokenizer_gives: tuple[str, ...] | None = None,
) -> list[Path]:
    """Writes the config, weights, image processor (see `hf_images.write`) and tokenizer, if any.

    `head` is the class of the model and its `model_type`. A model without texts has no
    `tokenizer_gives`, the outputs of the tokenizer that the model takes.
    """
    kind, model_type = head
    named = {"architectures": [kind], "model_type": model_type, "torch_dtype": extras.weights}
    tokenizer = extras.tokenizer if tokenizer_gives else None
    return [
        files.save_json({**named, **config}, directory / "config.json"),
        files.save_safetensors(tensors, directory / "model.safetensors", extras.narrow),
        hf_images.write(module, directory, extras, processor),
        *hf_tokenizer.write(tokenizer, directory, tokenizer_gives or ()),
    ]


def section(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """Returns a section with the defaults of its class. Old files repeat it as NAME_dict."""
    values = config.get(f"{name}_dict") or config.get(name) or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: {name} is {values!r}, not a mapping")
    return {**defaults, **values}


def encoder_fields(config: Mapping[str, Any], where: object, prefix: str = "") -> dict[str, Any]:
    """Reads the fields that every encoder has; raises UserError if one is invalid."""
    sizes = {ours: base.integer(config, prefix + name, where) for ours, name in _SIZES.items()}
    if sizes["width"] % sizes["heads"]:
        raise UserError(f"{where}: {sizes['heads']} heads do not divide the width {sizes['width']}")
    activations = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | _OTHER_NAMES
    name = config["hidden_act"]
    if name not in activations:
        known = ", ".join(activations)
        raise UserError(f"{where}: hidden_act {name!r} is not known (known: {known})")
    eps = base.number(config, "layer_norm_eps", where)
    return {**sizes, "activation": activations[name], "norm_eps": eps}


def encoder_config(tower: Any, prefix: str = "") -> dict[str, Any]:
    """Writes the fields that `encoder_fields` reads."""
    layers = tower.transformer
    return {
        **{prefix + name: getattr(layers, ours) for ours, name in _SIZES.items()},
        "hidden_act": ACTIVATIONS[layers.activation],
        "layer_norm_eps": layers.norm_eps,
    }


def image_tower(
    config: Mapping[str, Any],
    where: object,
    notes: list[str],
    *,
    square: bool = True,
    **fields: Any,
) -> VisionTransformer:
    """Makes the image tower of a config, with `fields`; raises UserError for invalid values."""
    if config["num_channels"] != 3:
        raise UserError(f"{where}: num_channels is {config['num_channels']}; only 3 can be read")
    if not config.get("qkv_bias", True):
        raise UserError(f"{where}: qkv_bias is false; only attention with a bias can be read")
    patch = base.one_side(config["patch_size"], "patch_size", where)
    size = base.pair(config["image_size"], "image_size", where)
    if square:
        base.one_side(size, "image_size", where)
    return base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled(size, patch, notes),
        patch_size=patch,
        **fields,
        **encoder_fields(config, where),
    )


def image_config(vit: VisionTransformer) -> dict[str, Any]:
    """Writes what `image_tower` reads."""
    return {
        **encoder_config(vit),
        "image_size": base.one_or_two(vit.image_size),
        "patch_size": vit.patch_size,
        "num_channels": 3,
    }

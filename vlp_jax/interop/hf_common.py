"""Helpers for the formats of Hugging Face `transformers`: configs, special tokens, layers.

A config.json holds only differences from the defaults of its class. So the defaults are part of a
format; they are taken from transformers 4.57 and 5.24.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import Table, heads_in, heads_out, linear, norm

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Our name -> the name in `transformers.activations.ACT2FN`.
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_OTHER_NAMES = {"gelu_new": "gelu_tanh", "gelu_python": "gelu"}  # other names, the same functions


def layers_as_in_clip(ours: str, theirs: str) -> Table:
    """Maps the layers of an encoder to the names in CLIPModel and SiglipModel."""
    return [
        *norm(f"{ours}/norm_attention", f"{theirs}.layer_norm1"),
        *heads_in(f"{ours}/attention/query", f"{theirs}.self_attn.q_proj"),
        *heads_in(f"{ours}/attention/key", f"{theirs}.self_attn.k_proj"),
        *heads_in(f"{ours}/attention/value", f"{theirs}.self_attn.v_proj"),
        *heads_out(f"{ours}/attention/out", f"{theirs}.self_attn.out_proj"),
        *norm(f"{ours}/norm_mlp", f"{theirs}.layer_norm2"),
        *linear(f"{ours}/mlp/up", f"{theirs}.mlp.fc1"),
        *linear(f"{ours}/mlp/down", f"{theirs}.mlp.fc2"),
    ]


def layers_as_in_vit(ours: str, theirs: str) -> Table:
    """Maps the layers of an encoder to the names in ViTModel and ViTMAEModel of transformers 4."""
    attention = f"{theirs}.attention"
    return [
        *norm(f"{ours}/norm_attention", f"{theirs}.layernorm_before"),
        *heads_in(f"{ours}/attention/query", f"{attention}.attention.query"),
        *heads_in(f"{ours}/attention/key", f"{attention}.attention.key"),
        *heads_in(f"{ours}/attention/value", f"{attention}.attention.value"),
        *heads_out(f"{ours}/attention/out", f"{attention}.output.dense"),
        *norm(f"{ours}/norm_mlp", f"{theirs}.layernorm_after"),
        *linear(f"{ours}/mlp/up", f"{theirs}.intermediate.dense"),
        *linear(f"{ours}/mlp/down", f"{theirs}.output.dense"),
    ]


def open_folder(path: Path, model_type: str) -> tuple[Path, dict[str, Any]]:
    """Finds the file of weights, and loads the config beside it.

    Raises:
      UserError: one of the files is missing, or the config has another `model_type`.
    """
    weights = files.find_weights(path, WEIGHTS)
    file = weights.parent / "config.json"
    if not file.is_file():
        raise UserError(f"{weights} needs its config.json beside it, and there is none")
    config = files.load_json(file)
    actual = config.get("model_type")
    if actual != model_type:
        raise UserError(f"{file} has model_type {actual!r}, and this format is {model_type!r}")
    return weights, config


def section(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """Returns the values of `text_config` or `vision_config`, with the defaults of its class.

    Old files repeat a section as NAME_dict, which takes precedence.

    Raises:
      UserError: the section is no mapping.
    """
    values = config.get(f"{name}_dict") or config.get(name) or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: {name} is {values!r}, not a mapping")
    return with_defaults(values, defaults)


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Adds the default of each key that a config does not have."""
    return {**defaults, **values}


def activation_of(name: Any, where: object) -> str:
    """Returns our name of an activation.

    Raises:
      UserError: there is no such activation here.
    """
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | _OTHER_NAMES
    if name not in ours:
        raise UserError(f"{where}: hidden_act {name!r} is not known (known: {', '.join(ours)})")
    return ours[name]


def encoder_fields(config: Mapping[str, Any], where: object, prefix: str = "") -> dict[str, Any]:
    """Reads the fields of our tower that every encoder's config has.

    Raises:
      UserError: a size is invalid, or the heads do not divide the width.
    """
    names = {
        "width": f"{prefix}hidden_size",
        "depth": f"{prefix}num_hidden_layers",
        "mlp_dim": f"{prefix}intermediate_size",
        "heads": f"{prefix}num_attention_heads",
    }
    fields = {ours: base.integer(config, theirs, where) for ours, theirs in names.items()}
    if fields["width"] % fields["heads"]:
        raise UserError(
            f"{where}: {fields['heads']} heads do not divide the width {fields['width']}"
        )
    return {
        **fields,
        "activation": activation_of(config["hidden_act"], where),
        "norm_eps": base.number(config, "layer_norm_eps", where),
    }


def encoder_config(tower: Any, prefix: str = "") -> dict[str, Any]:
    """Writes the fields that `encoder_fields` reads."""
    layers = tower.transformer
    return {
        f"{prefix}hidden_size": layers.width,
        f"{prefix}num_hidden_layers": layers.depth,
        f"{prefix}intermediate_size": layers.mlp_dim,
        f"{prefix}num_attention_heads": layers.heads,
        "hidden_act": ACTIVATIONS[layers.activation],
        "layer_norm_eps": layers.norm_eps,
    }


def token_id(config: Mapping[str, Any], name: str) -> int:
    """Reads the id of a special token; 0 if the config has none or several."""
    value = config.get(name)
    return value if type(value) is int else 0


def three_channels(config: Mapping[str, Any], where: object) -> None:
    """Raises UserError unless the model takes RGB images."""
    if config["num_channels"] != 3:
        raise UserError(f"{where}: num_channels is {config['num_channels']}; only 3 can be read")


def biased_attention(config: Mapping[str, Any], where: object) -> None:
    """Raises UserError unless queries, keys and values have biases."""
    if not config["qkv_bias"]:
        raise UserError(f"{where}: qkv_bias is false; only attention with a bias can be read")


def read_texts(directory: Path, text: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Reads a text config and the tokenizer beside it, as fields of `Extras`.

    Args:
      kind: the tokenizer's class for this type of model, if its config names none.
    """
    extras: dict[str, Any] = {}
    for ours in ("bos_id", "eos_id", "pad_id"):
        value = text.get(f"{ours.removesuffix('_id')}_token_id")
        if type(value) is int:
            extras[ours] = value
    extras["tokenizer"] = TokenizerFiles.from_folder(directory, kind=kind)
    return extras

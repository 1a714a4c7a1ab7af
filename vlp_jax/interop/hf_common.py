"""What the formats of Hugging Face `transformers` share: configs, image processors, layers.

A config.json holds only what differs from the defaults of its class, so these are part of a format;
they are those of transformers 4.57 and 5.24.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files
from vlp_jax.interop.base import Extras
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import Table, heads_in, heads_out, linear, norm
from vlp_jax.interop.trees import Module

WEIGHTS = ("model.safetensors", "model.safetensors.index.json")

# Ours -> the name in `transformers.activations.ACT2FN`.
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "quick_gelu": "quick_gelu"}
_OTHER_NAMES = {"gelu_new": "gelu_tanh", "gelu_python": "gelu"}  # the same functions

# Resampling of PIL, which image processors name by its number.
RESAMPLING = {"bilinear": 2, "bicubic": 3}


def layers_as_in_clip(ours: str, theirs: str) -> Table:
    """The layers of an encoder as CLIPModel and SiglipModel name them."""
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
    """The layers of an encoder as ViTModel and ViTMAEModel of transformers 4 name them."""
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
    """The file of weights, and the config beside it.

    Raises:
      UserError: one of them is not there, or the config is another model's.
    """
    weights = files.find_weights(path, WEIGHTS)
    file = weights.parent / "config.json"
    if not file.is_file():
        raise UserError(f"{weights} needs its config.json beside it, and there is none")
    config = files.load_json(file)
    found = config.get("model_type")
    if found != model_type:
        raise UserError(f"{file} has model_type {found!r}, and this format is {model_type!r}")
    return weights, config


def section(
    config: Mapping[str, Any], name: str, defaults: Mapping[str, Any], where: object
) -> dict[str, Any]:
    """The values of `text_config` or `vision_config`, with the defaults of their class.

    Old files repeat a section as NAME_dict, which then counts alone.

    Raises:
      UserError: the section is no mapping.
    """
    values = config.get(f"{name}_dict") or config.get(name) or {}
    if not isinstance(values, dict):
        raise UserError(f"{where}: {name} is {values!r}, not a mapping")
    return with_defaults(values, defaults)


def with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config, and the default of each key that it does not have."""
    return {**defaults, **values}


def activation_of(name: Any, where: object) -> str:
    """Our name of an activation.

    Raises:
      UserError: we do not have it.
    """
    ours = {theirs: ours for ours, theirs in ACTIVATIONS.items()} | _OTHER_NAMES
    if name not in ours:
        raise UserError(f"{where}: hidden_act {name!r} is not known (known: {', '.join(ours)})")
    return ours[name]


def encoder_fields(config: Mapping[str, Any], where: object, prefix: str = "") -> dict[str, Any]:
    """The fields of a tower of ours that a config gives for every encoder.

    Raises:
      UserError: a size is none, or the heads do not divide the width.
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
    """The inverse of `encoder_fields`."""
    return {
        f"{prefix}hidden_size": tower.width,
        f"{prefix}num_hidden_layers": tower.depth,
        f"{prefix}intermediate_size": tower.mlp_dim,
        f"{prefix}num_attention_heads": tower.heads,
        "hidden_act": ACTIVATIONS[tower.activation],
        "layer_norm_eps": tower.norm_eps,
    }


def token_id(config: Mapping[str, Any], name: str) -> int:
    """The id of a special token; 0 if the config has none, or several, and the model uses none."""
    value = config.get(name)
    return value if type(value) is int else 0


def three_channels(config: Mapping[str, Any], where: object) -> None:
    """
    Raises:
      UserError: the model takes other images than RGB.
    """
    if config["num_channels"] != 3:
        raise UserError(f"{where}: num_channels is {config['num_channels']}; only 3 can be read")


def biased_attention(config: Mapping[str, Any], where: object) -> None:
    """
    Raises:
      UserError: queries, keys and values have no bias.
    """
    if not config["qkv_bias"]:
        raise UserError(f"{where}: qkv_bias is false; only attention with a bias can be read")


def write_processor(
    module: Module, directory: Path, extras: Extras, kind: str, cropping: str
) -> Path:
    """preprocessor_config.json.

    Args:
      kind: the class of the image processor if images are squashed.
      cropping: the class if their middle is cut out.
    """
    mean, std = extras.pixels_of(module)
    height, width = base.image_of(module).image_size
    crop = extras.resize == "crop"
    config: dict[str, Any] = {
        "image_processor_type": cropping if crop else kind,
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": height, "width": width},
        "resample": RESAMPLING[extras.interpolation],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }
    if cropping == kind or crop:
        config["do_center_crop"] = crop
    if crop:
        config["size"] = {"shortest_edge": min(height, width)}
        config["crop_size"] = {"height": height, "width": width}
    return files.save_json(config, directory / "preprocessor_config.json")


def read_extras(
    directory: Path, text: Mapping[str, Any] | None, notes: list[str]
) -> dict[str, Any]:
    """What a folder's image processor, text config and tokenizer say, as fields of `Extras`.

    Args:
      text: the section of the config; None for an image tower alone.
    """
    config = _processor(directory)[1]
    extras: dict[str, Any] = {}
    if config:
        extras["resize"] = "crop" if config.get("do_center_crop") else "squash"
        names = {number: name for name, number in RESAMPLING.items()}
        resample = config.get("resample", RESAMPLING["bicubic"])
        if resample not in names:
            notes.append(f"its images are resampled by PIL's method {resample}, here bicubically")
        extras["interpolation"] = names.get(resample, "bicubic")
    if text is not None:
        for ours in ("bos_id", "eos_id", "pad_id"):
            value = text.get(f"{ours.removesuffix('_id')}_token_id")
            if type(value) is int:
                extras[ours] = value
        extras["tokenizer"] = TokenizerFiles.found(directory)
    return extras


def _processor(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The file and the config of an image processor; an empty config if there is none."""
    file = directory / "preprocessor_config.json"
    config = files.load_json_if_there(file)
    if not config:
        file = directory / "processor_config.json"
        config = files.load_json_if_there(file).get("image_processor") or {}
    return file, config


def read_pixels(
    directory: Path,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    like: Module | None,
    notes: list[str],
) -> dict[str, tuple[float, ...]]:
    """`image_mean` and `image_std` of a folder's image processor.

    Without one they are those of `like`, or else `mean` and `std`, which a note says.

    Raises:
      UserError: the file does not hold three numbers of each.
    """
    file, config = _processor(directory)
    if not config:
        mean, std = getattr(like, "image_mean", mean), getattr(like, "image_std", std)
        notes.append(f"{directory} has no image processor: image_mean {mean}, image_std {std}")
        return {"image_mean": tuple(mean), "image_std": tuple(std)}
    found = {
        name: config.get(name, default)
        for name, default in (("image_mean", mean), ("image_std", std))
    }
    if not config.get("do_normalize", True):
        found = {"image_mean": (0.0, 0.0, 0.0), "image_std": (1.0, 1.0, 1.0)}
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if not math.isclose(factor, 1 / 255, rel_tol=1e-3):
        raise UserError(f"{file}: rescale_factor {factor} is not 1/255, as our pixels are scaled")
    for name, values in found.items():
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"{file}: {name} is {values!r}, not three numbers")
    return {name: tuple(float(x) for x in values) for name, values in found.items()}

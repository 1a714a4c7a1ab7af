"""open_clip: open_clip_config.json and open_clip_model.safetensors.

Source: open_clip_torch 3.3, model.py, transformer.py, timm_model.py and factory.py. The folder is
loaded by `open_clip.create_model_and_transforms("local-dir:PATH")`.

There are two kinds of image tower:
- native: always with a class token, and without a bias of the patches.
- timm: sizes are known by the name of timm's model alone. So only the SigLIP family can be written.
The text tower is native in both cases. With a timm tower its keys begin with "text.".

The default activation is the erf GELU. `act_kwargs` gives a native tower the tanh approximation,
and `quick_gelu` gives both towers the quick GELU. A timm tower's activation follows from its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_tokenizer, open_clip_coca, timm
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.open_clip_config import (
    check_config,
    extras_of,
    image_fields,
    native_config,
    pixels_of,
    read_config,
    resize_problems,
    text_config,
    text_fields,
    tokenizer_of,
    trunk_config,
    trunk_fields,
)
from vlp_jax.interop.open_clip_table import layers, native_tower
from vlp_jax.interop.tables import (
    LINEAR,
    Entry,
    Table,
    from_theirs,
    linear,
    norm,
    to_theirs,
)
from vlp_jax.interop.timm_names import siglip_name
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.coca import CoCa
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.vit import VisionTransformer

MODEL = "open_clip"
KINDS = (DualEncoder, CoCa)
LOADED_BY = 'open_clip.create_model_and_transforms("local-dir:{}")'
HOLDS = ("float32", "bfloat16")
CONFIG = "open_clip_config.json"
TOKENIZER_GIVES = ("input_ids", "attention_mask")
WEIGHTS = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
)
TRUNK, DECODER = "visual.trunk.", "text_decoder."
IGNORED = (r"(text\.)?attn_mask", r"text\.transformer\.embeddings\.position_ids")

# Values of our fields that the two kinds of towers can express.
NATIVE_HAS = {
    "pooling": ("cls", "mean"),
    "class_token": (True,),
    "registers": (0,),
    "patch_bias": (False,),
}
TRUNK_HAS = {
    "registers": (0,),
    "patch_bias": (True,),
    "pre_norm": (False,),
    "norm_after_pool": (False,),
    "qk_norm": (False,),
    "layer_scale": (None,),
}
TEXT_HAS = {"pooling": ("eos", "argmax", "last"), "padding_mask": (False,)}


def table(trunk: bool, text_bias: bool) -> Table:
    """Returns the mapping.

    Args:
      trunk: whether the image tower is a timm tower.
      text_bias: whether the text head has a bias. With a bias it is a Linear; without, it is a bare
        matrix, with our order of axes.
    """
    text = "text." if trunk else ""
    image = timm.table(TRUNK) if trunk else native_tower()
    image_head = (
        linear("image_projection", "visual.head.proj")
        if trunk
        else [Entry("image_projection/kernel", "visual.proj")]
    )
    text_head = (
        [
            Entry("text_projection/kernel", f"{text}text_projection.weight", LINEAR),
            Entry("text_projection/bias", f"{text}text_projection.bias"),
        ]
        if text_bias
        else [Entry("text_projection/kernel", f"{text}text_projection")]
    )
    return [
        Entry("logit_scale", "logit_scale"),
        Entry("logit_bias", "logit_bias"),
        *image,
        *image_head,
        Entry("text/token_embedding/embedding", f"{text}token_embedding.weight"),
        Entry("text/position_embedding", f"{text}positional_embedding"),
        *layers("text/encoder/layers", f"{text}transformer.resblocks.{{i}}"),
        *norm("text/encoder/norm", f"{text}ln_final"),
        *text_head,
    ]


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder or a file of weights.

    Without open_clip_config.json beside it, `like` must supply what does not follow from shapes:
    heads, activations, epsilons, poolings, and whether the text is causal.

    Raises:
      UserError: a setting is unknown, or the files hold no model that can be expressed here.
    """
    weights = files.find_weights(path, WEIGHTS)
    where = weights.parent / CONFIG
    config = files.load_json_if_there(where)
    if not config and not isinstance(like, KINDS):
        raise UserError(
            f"{weights} needs its {CONFIG} beside it, or an image and text model that it goes into"
        )
    notes: list[str] = []
    tensors = _plain_keys(files.load_tensors(weights))
    model = read_config(config, where)
    if any(key.startswith(DECODER) for key in tensors) or open_clip_coca.SECTION in model:
        return _coca(tensors, config, like, weights, notes)
    check_config(model, where)
    image, tensors = _image(tensors, model, like, weights, notes)
    trunk = any(key.startswith(TRUNK) for key in tensors)
    text_bias = any(key.endswith("text_projection.bias") for key in tensors)
    module = DualEncoder(
        image=image,
        text=text_fields(tensors, "text." if trunk else "", model, like, weights),
        embed_dim=_embed_dim(tensors, image, weights),
        logit_scale_init=float(model.get("init_logit_scale", np.log(1 / 0.07))),
        logit_bias_init=-10.0 if "logit_bias" in tensors else None,
        image_head=_image_head(tensors),
        text_head=_text_head(tensors, text_bias),
        pixels=pixels_of(config, like, where, notes),
    )
    size = image.image_size
    mapping = table(trunk, text_bias)
    params = from_theirs(mapping, tensors, expected_shapes(module), weights, IGNORED)
    return Imported(module, params, notes, extras_of(config, weights.parent, size, notes))


def _coca(
    tensors: Tensors,
    config: Mapping[str, Any],
    like: Module | None,
    weights: Path,
    notes: list[str],
) -> Imported:
    where = weights.parent / CONFIG
    model = read_config(config, where)
    section = open_clip_coca.SECTION
    if model and section not in model:
        raise UserError(
            f"{where} has no {section}, and the weights beside it are a CoCa's: put in the section "
            f"of the config that it was trained with"
        )
    if not model and not isinstance(like, CoCa):
        raise UserError(f"{weights} is a CoCa: it needs its {CONFIG} beside it")
    pixels = pixels_of(config, like, where, notes)
    tokenizer = tokenizer_of(config, weights.parent, []) if config else None
    module = open_clip_coca.module_of(tensors, model, like, tokenizer, pixels, where, notes)
    mapping = open_clip_coca.table_of(module)
    params = from_theirs(mapping, tensors, expected_shapes(module), weights, IGNORED)
    extras = extras_of(config, weights.parent, module.image.image_size, notes)
    return Imported(module, params, notes, extras)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that open_clip cannot express."""
    if isinstance(module, CoCa):
        return open_clip_coca.check(module, extras)
    image, text = module.image, module.text
    problems = base.requirements(MODEL, "text", text, TEXT_HAS) + resize_problems(image, extras)
    if text.pooling == "eos" and extras.eos_id not in (None, text.eos_id):
        problems.append(
            f"eos_id {extras.eos_id} is not text.eos_id {text.eos_id}, at which it pools"
        )
    if image.class_token:  # a native tower
        tower = f"{MODEL}'s own image tower"
        problems += base.requirements(tower, "image", image, NATIVE_HAS)
        problems += base.requirements(tower, "", module, {"image_head": ("linear",)})
        seen, read = (part.transformer.activation for part in (image, text))
        # One key of the config switches both towers.
        if "quick_gelu" in (seen, read) and seen != read:
            problems.append(
                f"{MODEL} has quick_gelu in both towers or in none, not {seen!r} (image) and "
                f"{read!r} (text)"
            )
        return problems
    problems += base.requirements(f"{MODEL}'s timm towers", "image", image, TRUNK_HAS)
    if siglip_name(image) is None:
        layers = image.transformer
        problems.append(
            f"{MODEL} takes a tower without class token by timm's name alone, and timm has none "
            f"of width {layers.width}, depth {layers.depth}, {layers.heads} heads, mlp_dim "
            f"{layers.mlp_dim}, patch {image.patch_size}, {image.image_size[0]} x "
            f"{image.image_size[1]} pixels, pooling {image.pooling!r}, activation "
            f"{layers.activation!r} and norm_eps {layers.norm_eps} (its names are "
            f"vit_SIZE_patchN_siglip_PIXELS)"
        )
    return problems


def write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder for `open_clip.create_model_and_transforms("local-dir:...")`."""
    image, params = base.with_position_table(module.image, params)
    module, name = module.clone(image=image), directory.resolve().name
    model: dict[str, Any] = {
        "embed_dim": module.embed_dim,
        "init_logit_scale": module.logit_scale_init,
    }
    if module.logit_bias_init is not None:
        model["init_logit_bias"] = module.logit_bias_init
    if isinstance(module, CoCa):
        model |= open_clip_coca.config_of(module, extras, name)
        mapping = open_clip_coca.table_of(module)
    else:
        trunk = not image.class_token
        model["vision_cfg"] = trunk_config(module) if trunk else native_config(image)
        model["text_cfg"] = text_config(module, extras, name)
        # It selects open_clip's CustomTextCLIP, the class whose keys begin with "text.".
        model |= {"custom_text": True} if trunk else {}
        mapping = table(trunk, module.text_head == "linear_bias")
    if module.text.transformer.activation == "quick_gelu":
        model["quick_gelu"] = True
    config = {
        "model_cfg": model,
        "preprocess_cfg": {
            "size": list(module.image.image_size),
            "mean": list(module.pixels.mean),
            "std": list(module.pixels.std),
            "interpolation": extras.interpolation,
            "resize_mode": "squash" if extras.resize == "squash" else "shortest",
        },
    }
    tensors = to_theirs(mapping, params)
    return [
        files.save_json(config, directory / CONFIG),
        files.save_safetensors(tensors, directory / WEIGHTS[0], extras.narrow),
        *hf_tokenizer.write(extras.tokenizer, directory, TOKENIZER_GIVES),
    ]


def _plain_keys(tensors: Tensors) -> Tensors:
    """Unifies keys: no prefix of distributed training, "text." only with a timm tower."""
    if tensors and all(key.startswith("module.") for key in tensors):
        tensors = {key.removeprefix("module."): x for key, x in tensors.items()}
    named = any(key.startswith((TRUNK, DECODER)) for key in tensors)
    plain = {}
    for key, x in tensors.items():
        if not named:
            key = key.removeprefix("text.")  # CustomTextCLIP adds it to native towers as well
        if key.startswith(f"{TRUNK}head."):  # with timm_proj "", timm's classifier projects
            key = key.replace(f"{TRUNK}head.", "visual.head.proj.")
        # A model with `nonscalar_logit_scale` stores both as arrays of one number.
        plain[key] = x.reshape(()) if key in ("logit_scale", "logit_bias") and x.size == 1 else x
    return plain


def _image(
    tensors: Tensors,
    model: Mapping[str, Any],
    like: Module | None,
    where: Path,
    notes: list[str],
) -> tuple[VisionTransformer, Tensors]:
    trunk = {key.removeprefix(TRUNK): x for key, x in tensors.items() if key.startswith(TRUNK)}
    if not trunk:
        return image_fields(tensors, model, like, where, notes), tensors
    vit, trunk = timm.tower(trunk, trunk_fields(model, where), like, where, notes)
    others = {key: x for key, x in tensors.items() if not key.startswith(TRUNK)}
    return vit, {**others, **{TRUNK + key: x for key, x in trunk.items()}}


def _embed_dim(tensors: Tensors, image: VisionTransformer, where: Path) -> int:
    # A bare matrix is [inputs, outputs]; the weight of a torch Linear is [outputs, inputs].
    if "visual.proj" in tensors:
        return base.shape_of(tensors, "visual.proj", 2, where)[1]
    if "visual.head.proj.weight" in tensors:
        return base.shape_of(tensors, "visual.head.proj.weight", 2, where)[0]
    return image.width


def _image_head(tensors: Tensors) -> str:
    if "visual.head.proj.bias" in tensors:
        return "linear_bias"
    return "linear" if {"visual.proj", "visual.head.proj.weight"} & tensors.keys() else "none"


def _text_head(tensors: Tensors, bias: bool) -> str:
    if bias:
        return "linear_bias"
    return "linear" if any(key.endswith("text_projection") for key in tensors) else "none"

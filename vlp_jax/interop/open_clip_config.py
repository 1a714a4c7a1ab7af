"""Reads and writes open_clip_config.json.

Source: open_clip_torch 3.3, `CLIPVisionCfg`, `CLIPTextCfg` and `_build_vision_tower` in model.py,
`PreprocessCfg` in transform.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlp_jax.errors import UserError
from vlp_jax.interop import base, timm
from vlp_jax.interop.base import Extras
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.timm_names import fields_of, siglip_name
from vlp_jax.interop.trees import Module, image_of
from vlp_jax.models.coca import CoCaText
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import Pixels, tower_fields
from vlp_jax.models.vit import VisionTransformer

POOLINGS = {"cls": "tok", "mean": "avg"}
EPS = 1e-5  # default of torch.nn.LayerNorm
HEAD_WIDTH, TEXT_HEADS = 64, 8  # defaults of CLIPVisionCfg and CLIPTextCfg
TOKENIZER_KEYS = ("tokenizer_kwargs", "tokenizer_mode")
RESIZE_MODES = ("shortest", "longest", "squash")
TRUNK_PROJECTIONS = {"none": "none", "linear": "linear", "linear_bias": "linear"}

# Values in the two sections that a model must have to be expressed here.
HAS_KEYS = {
    "vision_cfg": {"attentional_pool": (False,), "timm_proj": ("none", "linear", "")},
    "text_cfg": {
        "hf_model_name": (None,),
        "embed_cls": (False,),
        "scaled_cosine_attn": (False,),
    },
}


def read_config(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Returns the part of a config that describes the model; {} without a config.

    Raises:
      UserError: the config lacks the part.
    """
    if not config:
        return {}
    model = config.get("model_cfg", config)
    for section in ("vision_cfg", "text_cfg"):
        if not isinstance(model.get(section), dict):
            raise UserError(f"{where} has no {section}")
    return model


def check_config(model: Mapping[str, Any], where: Path) -> None:
    """Raises UserError if the config describes a model that cannot be expressed here."""
    refuse_unless(HAS_KEYS, model, where)


def refuse_unless(
    keys: Mapping[str, Mapping[str, tuple[Any, ...]]], model: Mapping[str, Any], where: Path
) -> None:
    """Raises UserError if a key of a config's sections has a value other than the allowed ones."""
    for section, allowed in keys.items():
        for key, value in model.get(section, {}).items():
            if key in allowed and value not in allowed[key]:
                known = " or ".join(map(repr, allowed[key]))
                raise UserError(
                    f"{where}: {section}.{key} {value!r} cannot be expressed here (supported: "
                    f"{known})"
                )


def image_fields(
    tensors: Tensors,
    model: Mapping[str, Any],
    like: Module | None,
    where: Path,
    notes: list[str],
) -> VisionTransformer:
    """Makes the native image tower that tensors and a config describe; without a config, `like`.

    Raises:
      UserError: the pooling or the grid of patches is unknown.
    """
    config = model.get("vision_cfg")
    width, _, patch, _ = base.shape_of(tensors, "visual.conv1.weight", 4, where)
    rows, _ = base.shape_of(tensors, "visual.positional_embedding", 2, where)
    if config is None:
        vit = image_of(like)
        grid = base.grid_of(rows - 1, like, where)
        told = told_by(vit, "heads", "activation", "norm_eps", "pooling", "norm_after_pool")
        size = (grid[0] * patch, grid[1] * patch)
    else:
        told = {
            "heads": width
            // base.integer({"head_width": HEAD_WIDTH, **config}, "head_width", where),
            "pooling": _ours(POOLINGS, config.get("pool_type", "tok"), "pool_type", where),
            "norm_after_pool": bool(config.get("final_ln_after_pool", False)),
            **activation_and_eps(model, config, where),
        }
        # Both orders compute the same; `like` says which paths the parameters should have.
        if told["pooling"] == "cls":
            told["norm_after_pool"] = base.norm_after_pool_of(like)
        size = base.pair(config.get("image_size", 224), "image_size", where)
    vit = base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled(size, patch, notes),
        patch_size=patch,
        width=width,
        patch_bias=False,
        pre_norm="visual.ln_pre.weight" in tensors,
        **layer_sizes(tensors, "visual.transformer.resblocks.", where),
        **told,
    )
    return vit


def trunk_fields(model: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Reads the fields of a timm tower from a config; {} without a config.

    Raises:
      UserError: the name of the tower or its pooling is unknown.
    """
    if not model:
        return {}
    config = model["vision_cfg"]
    name = config.get("timm_model_name")
    fields = fields_of(str(name))
    if fields is None:
        raise UserError(
            f"{where}: timm_model_name {name!r} is not one that we know (the plain, CLIP and "
            f"SigLIP families)"
        )
    pooling = config.get("timm_pool", "avg")
    return {**fields, "pooling": timm.pooling_of(pooling, where)} if pooling else fields


def text_fields(
    tensors: Tensors, prefix: str, model: Mapping[str, Any], like: Module | None, where: Path
) -> TextTransformer:
    """Makes the text tower that tensors and a config describe; without a config, `like` helps.

    Raises:
      UserError: the pooling is unknown.
    """
    config = model.get("text_cfg")
    vocab_size, width = base.shape_of(tensors, f"{prefix}token_embedding.weight", 2, where)
    context_length, _ = base.shape_of(tensors, f"{prefix}positional_embedding", 2, where)
    if config is None:
        told = told_by(
            like.text, *("heads", "activation", "norm_eps", "pooling", "causal"), "eos_id", "pad_id"
        )
    else:
        poolings = {name: name for name in ("argmax", "eos", "last")}
        pooling = _ours(poolings, config.get("pool_type", "argmax"), "pool_type", where)
        told = {
            "heads": base.integer({"heads": TEXT_HEADS, **config}, "heads", where),
            "pooling": pooling,
            "causal": not config.get("no_causal_mask", False),
            # 2 is open_clip's default. The other poolings do not read the id: CLIP's last one is a
            # guess.
            "eos_id": config.get("eos_id", 2 if pooling == "eos" else vocab_size - 1),
            "pad_id": config.get("pad_id", 0),
            **activation_and_eps(model, config, where),
        }
    text = base.tower(
        TextTransformer,
        where,
        vocab_size=vocab_size,
        context_length=context_length,
        width=width,
        **layer_sizes(tensors, f"{prefix}transformer.resblocks.", where),
        **told,
    )
    return text


def native_config(vit: VisionTransformer) -> dict[str, Any]:
    """Makes `vision_cfg` for a native tower."""
    return {
        "image_size": _size(vit),
        "patch_size": vit.patch_size,
        "width": vit.width,
        "layers": vit.transformer.depth,
        "head_width": vit.width // vit.transformer.heads,
        "mlp_ratio": base.mlp_ratio(vit.width, vit.transformer.mlp_dim),
        "pool_type": POOLINGS[vit.pooling],
        "no_ln_pre": not vit.pre_norm,
        "final_ln_after_pool": vit.norm_after_pool,
        **layers_config(vit),
    }


def trunk_config(module: DualEncoder) -> dict[str, Any]:
    """Makes `vision_cfg` for a timm tower."""
    config = {
        "image_size": _size(module.image),
        "timm_model_name": siglip_name(module.image),
        "timm_model_pretrained": False,
        "timm_pool": timm.POOLINGS[module.image.pooling],
        "timm_proj": TRUNK_PROJECTIONS[module.image_head],
    }
    return config | {"timm_proj_bias": True} if module.image_head == "linear_bias" else config


def text_config(module: DualEncoder, extras: Extras, name: str) -> dict[str, Any]:
    """Makes `text_cfg`; for `name` see `text_sizes`."""
    text = module.text
    return {
        **text_sizes(text, extras, name),
        "no_causal_mask": not text.causal,
        "pool_type": text.pooling,
        "proj_type": "none" if module.text_head == "none" else "linear",
        "proj_bias": module.text_head == "linear_bias",
        **layers_config(text),
    }


def text_sizes(text: TextTransformer | CoCaText, extras: Extras, name: str) -> dict[str, Any]:
    """Makes the part of `text_cfg` with the sizes of a text tower and its tokenizer.

    Args:
      name: the repository with the tokenizer's files. open_clip ignores the name for "local-dir:",
        where it takes the files in the folder.
    """
    tokenizer: dict[str, Any] = {}
    if extras.tokenizer is not None:
        tokenizer |= {"hf_tokenizer_name": name} if extras.tokenizer.contents else {}
        tokenizer |= extras.tokenizer.open_clip or {}
    return {
        **tokenizer,
        "context_length": text.context_length,
        "vocab_size": text.vocab_size,
        "width": text.width,
        "heads": text.transformer.heads,
        "layers": text.transformer.depth,
        "mlp_ratio": base.mlp_ratio(text.width, text.transformer.mlp_dim),
        "eos_id": text.eos_id if extras.eos_id is None else extras.eos_id,
        "pad_id": text.pad_id if extras.pad_id is None else extras.pad_id,
    }


def pixels_of(
    config: Mapping[str, Any], like: Module | None, where: Path, notes: list[str]
) -> Pixels:
    """Returns the normalization of pixels in the config, in `like`, or open_clip's default.

    Raises:
      UserError: mean or std is not three numbers.
    """
    section = config.get("preprocess_cfg") or {}
    defaults = {"mean": base.OPENAI_MEAN, "std": base.OPENAI_STD}
    if not config:
        defaults = {"mean": like.pixels.mean, "std": like.pixels.std}
    elif not {"mean", "std"} <= section.keys():
        notes.append(f"{where} does not say how pixels are normalized: as OpenAI's CLIP")
    pixels = {}
    for name, default in defaults.items():
        values = section.get(name) or default
        values = [values] * 3 if isinstance(values, int | float) else values
        if not isinstance(values, list | tuple) or len(values) != 3:
            raise UserError(f"{where}: preprocess_cfg.{name} is {values!r}, not three numbers")
        pixels[name] = tuple(float(x) for x in values)
    return Pixels(**pixels)


def extras_of(
    config: Mapping[str, Any], directory: Path, size: tuple[int, int], notes: list[str]
) -> dict[str, Any]:
    """Reads the preprocessing of images and texts, as fields of `Extras`.

    Args:
      size: height and width of the images that the model takes; `preprocess_cfg.size` is ignored.
    """
    if not config:
        return {}
    section = config.get("preprocess_cfg") or {}
    mode = section.get("resize_mode") or "shortest"
    interpolation = section.get("interpolation") or "bicubic"
    if mode == "longest":
        notes.append("its images are fitted in whole and padded, here their middle is cut out")
    if mode not in RESIZE_MODES or interpolation not in (*base.INTERPOLATIONS, "random"):
        notes.append(
            f"open_clip does not know resize_mode {mode!r} with interpolation {interpolation!r}"
        )
    extras: dict[str, Any] = {"resize": "squash" if mode == "squash" else "crop"}
    if mode != "squash" and size[0] != size[1]:
        # For sides that differ, open_clip uses ResizeKeepRatio and does not pass the interpolation.
        extras |= {"scale": size, "interpolation": "bicubic"}
    else:
        extras["interpolation"] = "bilinear" if interpolation == "bilinear" else "bicubic"
    return {**extras, "tokenizer": tokenizer_of(config, directory, notes)}


def tokenizer_of(
    config: Mapping[str, Any], directory: Path, notes: list[str]
) -> TokenizerFiles | None:
    """Reads the files that `open_clip.get_tokenizer` reads: none unless the config names some."""
    text = read_config(config, directory)["text_cfg"]
    settings = {name: text[name] for name in TOKENIZER_KEYS if text.get(name)}
    name = text.get("hf_tokenizer_name")
    tokenizer = TokenizerFiles.from_folder(directory, open_clip=settings) if name else None
    if tokenizer is not None:
        return tokenizer
    if name:
        notes.append(f"its tokenizer is {name}, whose files are not in {directory}")
    return TokenizerFiles({}, open_clip=settings) if settings else None


def resize_problems(image: VisionTransformer, extras: Extras) -> list[str]:
    """Returns a line for each setting of the resize that `preprocess_cfg` cannot express."""
    lines = []
    height, width = image.image_size
    keeps = {None, image.image_size, *([height] if height == width else [])}
    if extras.scale not in keeps:
        lines.append(
            f"open_clip scales images to cover {height} x {width} pixels, not to {extras.scale} "
            f"before it cuts: give --resize"
        )
    if extras.interpolation not in base.INTERPOLATIONS:
        lines.append(f"open_clip does not resize by {extras.interpolation!r}: give --interpolation")
    return lines


def layers_config(tower: VisionTransformer | TextTransformer | CoCaText) -> dict[str, Any]:
    """Makes the keys of a tower's section that describe its layers."""
    layers = tower.transformer
    config: dict[str, Any] = {"norm_kwargs": {"eps": layers.norm_eps}}
    if layers.activation == "gelu_tanh":
        config["act_kwargs"] = {"approximate": "tanh"}
    if layers.layer_scale is not None:
        config["ls_init_value"] = layers.layer_scale
    if layers.qk_norm:
        config["qk_norm"] = True
    return config


def activation_and_eps(
    model: Mapping[str, Any], config: Mapping[str, Any], where: Path
) -> dict[str, Any]:
    """Reads the activation and the epsilon of the norms from a section."""
    tanh = (config.get("act_kwargs") or {}).get("approximate") == "tanh"
    activation = "gelu_tanh" if tanh else "gelu"
    return {
        "activation": "quick_gelu" if model.get("quick_gelu") else activation,
        "norm_eps": base.number({"eps": EPS, **(config.get("norm_kwargs") or {})}, "eps", where),
    }


def _ours(names: Mapping[str, str], theirs: Any, what: str, where: Path) -> str:
    ours = {value: key for key, value in names.items()}
    if theirs not in ours:
        raise UserError(f"{where}: {what} {theirs!r} cannot be expressed here")
    return ours[theirs]


def told_by(tower: Any, *fields: str) -> dict[str, Any]:
    """Selects some fields of a tower, by name."""
    return {field: value for field, value in tower_fields(tower).items() if field in fields}


def layer_sizes(tensors: Tensors, blocks: str, where: Path) -> dict[str, Any]:
    """Reads the fields of a tower's layers from the shapes of its tensors.

    Args:
      blocks: the prefix of their keys, up to the number of the layer.

    Raises:
      UserError: the first layer is missing.
    """
    mlp_dim, _ = base.shape_of(tensors, f"{blocks}0.mlp.c_fc.weight", 2, where)
    numbers = {key[len(blocks) :].split(".")[0] for key in tensors if key.startswith(blocks)}
    return {
        "depth": len(numbers),
        "mlp_dim": mlp_dim,
        "qk_norm": f"{blocks}0.attn.ln_q.weight" in tensors,
        "layer_scale": 1e-5 if f"{blocks}0.ls_1.gamma" in tensors else None,
    }


def _size(vit: VisionTransformer) -> int | list[int]:
    height, width = vit.image_size
    return height if height == width else [height, width]

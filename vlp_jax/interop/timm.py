"""timm's `VisionTransformer`: config.json and model.safetensors.

Source: timm 1.0.31, models/vision_transformer.py, layers/attention_pool.py and models/_hub.py. The
folder is loaded by `timm.create_model("local-dir:PATH", pretrained=True)`. Its config names an
architecture, and lists differences from it under `model_args`. Written configs list everything.
Without a config that names a known architecture, a model to compare with must supply what does not
follow from shapes: heads, activation, epsilon and pooling.

Three conventions differ from ours:
- Positions. With `no_embed_class`, timm's table has rows for patches alone; otherwise it also has
  rows for the class token and the registers. Our table never has rows for registers. On reading,
  positions of registers are added to the registers. On writing a model with registers, the class
  token's position is added to the token, because timm has no table for class token and patches.
- Attention pooling ignores class token and registers, unless `pool_include_prefix`.
- A LayerNorm before the blocks (`pre_norm`) and a bias of the patches exclude each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, timm_config
from vlp_jax.interop.base import Extras, Format, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.tables import (
    BATCHED,
    QKV,
    Entry,
    Table,
    from_theirs,
    fused,
    modules,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes, image_of
from vlp_jax.models.positions import sincos_2d
from vlp_jax.models.values import tower_fields
from vlp_jax.models.vit import VisionTransformer

MODEL = "timm's VisionTransformer"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
HEAD = ("head.weight", "head.bias")  # a classifier, which our tower does not have

# Our modules in a layer and in the attention pooling -> their names.
LAYERS = {
    "norm_attention": "norm1",
    "attention/query_norm": "attn.q_norm",
    "attention/key_norm": "attn.k_norm",
    "attention/out": "attn.proj",
    "norm_mlp": "norm2",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
POOLING = {
    "attention/query": "q",
    "attention/out": "proj",
    "norm": "norm",
    "mlp/up": "mlp.fc1",
    "mlp/down": "mlp.fc2",
}
POOLINGS = {"cls": "token", "mean": "avg", "map": "map", "none": ""}
# Epsilon of the norms -> an architecture with it: `model_args` cannot express an epsilon, but they
# override everything else.
ARCHITECTURES = {1e-6: "vit_base_patch16_224", 1e-5: "vit_base_patch16_clip_224"}
# Arguments that are not supported here -> the value without effect.
UNKNOWN_ARGS = {
    "qkv_bias": True,
    "proj_bias": True,
    "scale_attn_norm": False,
    "scale_mlp_norm": False,
    "final_norm": True,
    "in_chans": 3,
}
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")  # the same names as ours


def table(prefix: str = "") -> Table:
    """Returns the mapping, for keys that begin with `prefix`."""
    layers, block, pool = "image/encoder/layers", f"{prefix}blocks.{{i}}", f"{prefix}attn_pool"
    return [
        Entry("image/class_token", f"{prefix}cls_token", BATCHED),
        Entry("image/registers", f"{prefix}reg_token", BATCHED),
        Entry("image/position_embedding", f"{prefix}pos_embed", BATCHED),
        *fused(f"{layers}/attention", f"{block}.attn.qkv.weight", f"{block}.attn.qkv.bias"),
        *modules(LAYERS, layers, block),
        Entry(f"{layers}/layer_scale_attention/scale", f"{block}.ls1.gamma"),
        Entry(f"{layers}/layer_scale_mlp/scale", f"{block}.ls2.gamma"),
        Entry("image/pooling/probe", f"{pool}.latent", BATCHED),
        *fused("image/pooling/attention", f"{pool}.kv.weight", f"{pool}.kv.bias", QKV[1:]),
        *modules(POOLING, "image/pooling", pool),
        *modules(
            {
                "patch_embedding/projection": f"{prefix}patch_embed.proj",
                "pre_norm": f"{prefix}norm_pre",
                "encoder/norm": f"{prefix}norm",
                "norm": f"{prefix}fc_norm",
            },
            "image",
        ),
    ]


def _read(path: Path, like: Module | None = None) -> Imported:
    weights = files.find_weights(path, WEIGHTS)
    where = weights.parent / "config.json"
    config = files.load_json_if_there(where)
    notes: list[str] = []
    known = _known(config, where, notes)
    tensors = files.load_tensors(weights)
    if any(key in tensors for key in HEAD):
        notes.append("left out, since the tower has no place for them: head.weight, head.bias")
        tensors = {key: x for key, x in tensors.items() if key not in HEAD}
    module, tensors = tower(tensors, known, like, weights, notes)
    params = from_theirs(table(), tensors, expected_shapes(module), weights)
    size = known.get("image_size", module.image_size)
    return Imported(module, params, notes, timm_config.read_images(config, size, where, notes))


def _check(module: Module, extras: Extras) -> list[str]:
    problems = base.requirements(MODEL, "image", module, {"norm_eps": tuple(ARCHITECTURES)})
    if module.pre_norm and module.patch_bias:
        problems.append(f"{MODEL} with pre_norm has image.patch_bias False, not True")
    return problems + timm_config.image_problems(module.image_size, extras)


def _write(
    module: VisionTransformer, params: Params, directory: Path, extras: Extras
) -> list[Path]:
    args, params = _model_args(module, params)
    config = {
        "architecture": ARCHITECTURES[module.transformer.norm_eps],
        "num_classes": 0,
        "num_features": module.width,
        "global_pool": args["global_pool"],
        "model_args": args,
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, *module.image_size],
            "fixed_input_size": True,
            **timm_config.images_config(module.image_size, extras),
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }
    return [
        files.save_json(config, directory / "config.json"),
        files.save_safetensors(
            to_theirs(table(), params), directory / "model.safetensors", extras.narrow
        ),
    ]


def _model_args(vit: VisionTransformer, params: Params) -> tuple[dict[str, Any], Params]:
    """Returns the arguments of timm's class, and parameters with its convention of positions."""
    params, path = dict(params), "image/position_embedding"
    if vit.position == "sincos":
        params[path] = sincos_2d(vit.grid, vit.width)
    rows_of_class = vit.position == "learned" and vit.class_token and vit.class_position
    if rows_of_class and vit.registers:
        params["image/class_token"] = params["image/class_token"] + params[path][:1]
        params[path] = params[path][1:]
    # timm's projection of patches has a bias unless there is a pre_norm; zeros do nothing.
    if not vit.patch_bias and not vit.pre_norm:
        params["image/patch_embedding/projection/bias"] = np.zeros(vit.width, np.float32)
    layers = vit.transformer
    args = {
        "img_size": list(vit.image_size),
        "patch_size": vit.patch_size,
        "embed_dim": layers.width,
        "depth": layers.depth,
        "num_heads": layers.heads,
        "mlp_ratio": base.mlp_ratio(vit.width, layers.mlp_dim),
        "class_token": vit.class_token,
        "global_pool": POOLINGS[vit.pooling],
        "pos_embed": "none" if vit.position == "none" else "learn",
        "no_embed_class": not rows_of_class or vit.registers > 0,
        "reg_tokens": vit.registers,
        "pre_norm": vit.pre_norm,
        "fc_norm": vit.norm_after_pool,
        "pool_include_prefix": vit.pooling == "map" and vit.prefix_tokens > 0,
        "qk_norm": layers.qk_norm,
        "init_values": layers.layer_scale,
        "act_layer": layers.activation,
    }
    return {name: value for name, value in args.items() if value is not None}, params


def tower(
    tensors: Tensors, known: Mapping[str, Any], like: Module | None, where: object, notes: list[str]
) -> tuple[VisionTransformer, Tensors]:
    """Makes the image tower of tensors; returns it, and tensors with our convention of positions.

    `known` has `heads`, `activation`, `norm_eps`, `pooling` and `image_size`, as far as a config
    tells them; `like` supplies the rest. Raises UserError if neither does.
    """
    ours = {} if like is None else tower_fields(image_of(like))
    told: dict[str, Any] = {}
    for field in ("heads", "activation", "norm_eps", "pooling"):
        if field not in known and not ours:
            raise UserError(
                f"{where}: nothing says what the {field} of the image tower is: put the config of "
                f"its model beside it, or give the model that it goes into"
            )
        told[field] = known[field] if field in known else ours[field]
    width, _, patch, _ = base.shape_of(tensors, "patch_embed.proj.weight", 4, where)
    mlp_dim, _ = base.shape_of(tensors, "blocks.0.mlp.fc1.weight", 2, where)
    _check_prefix_pooling(told["pooling"], known, tensors, where)
    class_token, registers = "cls_token" in tensors, 0
    if "reg_token" in tensors:
        registers = base.shape_of(tensors, "reg_token", 3, where)[1]
    grid, tensors = _positions(tensors, known, like, (class_token, registers), where)
    size = known.get("image_size") or (grid[0] * patch, grid[1] * patch)
    rows = tensors["pos_embed"].shape[1] if "pos_embed" in tensors else 0
    module = base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled(size, patch, notes),
        patch_size=patch,
        width=width,
        depth=len({key.split(".")[1] for key in tensors if key.startswith("blocks.")}),
        mlp_dim=mlp_dim,
        class_token=class_token,
        registers=registers,
        position="learned" if rows else "none",
        # A table of patches alone has no row for the class token. Without a class token or a table
        # the field means nothing, and stays at its default.
        class_position=rows > grid[0] * grid[1] if class_token and rows else True,
        patch_bias="patch_embed.proj.bias" in tensors,
        pre_norm="norm_pre.weight" in tensors,
        norm_after_pool="fc_norm.weight" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        # Only whether it is None matters: it is the initial value, and the file has trained ones.
        layer_scale=1e-5 if "blocks.0.ls1.gamma" in tensors else None,
        **told,
    )
    return module, tensors


def _known(config: Mapping[str, Any], where: Path, notes: list[str]) -> dict[str, Any]:
    """Reads the tower's fields from a config; raises UserError if it cannot be expressed here."""
    if not config:
        return {}
    name, args = str(config.get("architecture")), config.get("model_args") or {}
    cfg = timm_config.section(config)
    known = timm_config.fields_of(name) or {}
    if not known:
        notes.append(f"{where}: nothing is known of the architecture {name} but its model_args")
    for arg, harmless in UNKNOWN_ARGS.items():
        if args.get(arg, harmless) != harmless:
            raise UserError(f"{where}: a model with {arg} {args[arg]!r} cannot be expressed here")
    if args.get("norm_layer") is not None:
        if str(args["norm_layer"]).lower() != "layernorm":
            raise UserError(f"{where}: norm_layer {args['norm_layer']!r} cannot be expressed here")
        # A norm given by name replaces the architecture's own, and timm's LayerNorm has this
        # epsilon.
        known["norm_eps"] = 1e-6
    if "num_heads" in args:
        known["heads"] = args["num_heads"]
    if args.get("act_layer") is not None:
        if args["act_layer"] not in ACTIVATIONS:
            raise UserError(f"{where}: act_layer {args['act_layer']!r} cannot be expressed here")
        known["activation"] = args["act_layer"]
    if "global_pool" in args:
        known["pooling"] = base.one_of(POOLINGS, args["global_pool"], "global_pool", where)
    if "img_size" in args or cfg.get("input_size"):
        size = args.get("img_size") or cfg["input_size"][1:]
        known["image_size"] = base.pair(size, "the image size", where)
    known["pool_include_prefix"] = bool(args.get("pool_include_prefix", False))
    return known


def _check_prefix_pooling(
    pooling: str, known: Mapping[str, Any], tensors: Tensors, where: object
) -> None:
    """Raises UserError if the model pools other tokens than ours.

    Our attention pooling uses all tokens, and our mean uses the patches alone.
    """
    if not {"cls_token", "reg_token"} & tensors.keys() or pooling not in ("map", "mean"):
        return
    included = known.get("pool_include_prefix", pooling == "map")
    if included != (pooling == "map"):
        raise UserError(
            f"{where}: global_pool {POOLINGS[pooling]!r} with pool_include_prefix {included} "
            f"cannot be expressed here when there are a class token or registers"
        )


def _positions(
    tensors: Tensors,
    known: Mapping[str, Any],
    like: Module | None,
    prefix: tuple[int, int],
    where: object,
) -> tuple[tuple[int, int], Tensors]:
    """Returns the grid of patches, and tensors whose table has no rows for registers.

    Args:
      prefix: the numbers of class tokens and registers.
    """
    patch, size = tensors["patch_embed.proj.weight"].shape[-1], known.get("image_size")
    grid = (size[0] // patch, size[1] // patch) if size else None
    if "pos_embed" not in tensors:
        if grid is None and like is None:
            raise UserError(f"{where} has no positions, so nothing says how large its images are")
        return grid or image_of(like).grid, tensors
    table = tensors["pos_embed"]
    if grid is None:
        rows = base.shape_of(tensors, "pos_embed", 3, where)[1]
        # The table may or may not have rows for class token and registers.
        counts = sorted({rows, rows - sum(prefix)}, reverse=True)
        if like is not None and image_of(like).patches in counts:
            grid = image_of(like).grid
        else:  # if both are squares, all rows are taken for patches
            squares = [n for n in counts if n > 0 and round(n**0.5) ** 2 == n]
            grid = base.grid_of([*squares, rows - sum(prefix)][0], like, where)
    class_tokens, registers = prefix
    if registers and table.shape[1] - grid[0] * grid[1] == sum(prefix):
        # Adding the positions to the registers once is the same as adding them in every call.
        tokens = tensors["reg_token"] + table[:, class_tokens : sum(prefix)]
        table = np.concatenate([table[:, :class_tokens], table[:, sum(prefix) :]], axis=1)
        tensors = {**tensors, "reg_token": tokens, "pos_embed": table}
    return grid, tensors


FORMAT = Format(
    (VisionTransformer,),
    'timm.create_model("local-dir:{}", pretrained=True)',
    ("float32", "bfloat16"),
    *(_read, _check, _write),
)

"""google-research/big_vision: the .npz of its `two_towers` model, or of its `vit` alone.

Source: google-research/big_vision, models/vit.py, models/proj/image_text/two_towers.py and
text_transformer.py, utils.py `load_params`. Keys may begin with "params/", beside the optimizer's
state. Layers may be separate or stacked (`scan`). It is Flax too, so axes have our order.

A file has no config:
- Sizes and heads follow from the shapes.
- Activation and epsilon are tanh GELU and 1e-6, as in all its models.
- Pixels are in [-1, 1], as in its configs.
- Images are pooled by attention if there is a MAPHead, at the class token if there is one, else by
  the mean. Texts are pooled by attention if there is a MAPHead, else at the last position. Its
  `pool_type` "0", "none", "first" and "max" leave no trace in a file and cannot be told apart.

Its class token has no position, so on writing ours is added to the token. Fixed sines and cosines
are written as a learned table, because big_vision's formula differs from ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files
from vlp_jax.interop.base import PLAIN_TEXT, PLAIN_TOWER, Extras, Format, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.tables import (
    BATCHED,
    QKV,
    SCALAR,
    Entry,
    Table,
    from_theirs,
    shorten,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes, image_of
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer
from vlp_jax.models.values import Pixels
from vlp_jax.models.vit import VisionTransformer

MODEL = "big_vision"
FILE = "model.npz"
_ATTENTION = "MultiHeadDotProductAttention"
TOWERS = {"img": "image", "txt": "text"}
# Our modules in a layer and in the attention pooling -> their names.
_SHARED = {
    **{f"attention/{part}": f"{_ATTENTION}_0/{part}" for part in (*QKV, "out")},
    "mlp/up": "MlpBlock_0/Dense_0",
    "mlp/down": "MlpBlock_0/Dense_1",
}
LAYERS = {**_SHARED, "norm_attention": "LayerNorm_0", "norm_mlp": "LayerNorm_1"}
POOLING = {**_SHARED, "norm": "LayerNorm_0"}
CLASSIFIER = ("head/kernel", "head/bias", "pre_logits/kernel", "pre_logits/bias")

# Names of early checkpoints -> today's (`fix_old_checkpoints` in models/vit.py).
RENAMED = (
    (r"Transformer/(posembed_input/)?pos_embedding$", "pos_embedding"),
    (r"(encoderblock(_\d+)?)/LayerNorm_2/", r"\1/LayerNorm_1/"),
    (r"(encoderblock(_\d+)?)/MlpBlock_3/", r"\1/MlpBlock_0/"),
    (rf"(encoderblock(_\d+)?)/{_ATTENTION}_1/", rf"\1/{_ATTENTION}_0/"),
    (rf"^((?:img/)?)(probe$|(?:LayerNorm|MlpBlock|{_ATTENTION})_0/)", r"\1MAPHead_0/\2"),
)

# Values of our fields that the format can express.
ENCODER_HAS = {"activation": ("gelu_tanh",), "norm_eps": (1e-6,)}
IMAGE_HAS = {
    **ENCODER_HAS,
    **PLAIN_TOWER,
    "patch_bias": (True,),
    "pre_norm": (False,),
    "norm_after_pool": (False,),
}
TEXT_HAS = {**ENCODER_HAS, **PLAIN_TEXT, "causal": (False,), "pooling": ("last", "map")}


def table(image: str = "img/") -> Table:
    """Returns the mapping; keys of the image tower begin with `image`."""
    towers = (("image", image, f"{image}Transformer"), ("text", "txt/", "txt/Encoder_0"))
    entries = [
        Entry("logit_scale", "t", SCALAR),
        Entry("logit_bias", "b", SCALAR),
        Entry("image/class_token", f"{image}cls", BATCHED),
        Entry("text/token_embedding/embedding", "txt/Embed_0/embedding"),
        *_modules({"image/patch_embedding/projection": f"{image}embedding"}),
        *_modules({"image_projection": "img/head", "text_projection": "txt/head"}),
    ]
    for tower, prefix, encoder in towers:
        entries += [
            Entry(f"{tower}/position_embedding", f"{prefix}pos_embedding", BATCHED),
            *_modules(LAYERS, f"{tower}/encoder/layers/", f"{encoder}/encoderblock_{{i}}/"),
            *_modules({f"{tower}/encoder/norm": f"{encoder}/encoder_norm"}),
            Entry(f"{tower}/pooling/probe", f"{prefix}MAPHead_0/probe", BATCHED),
            *_modules(POOLING, f"{tower}/pooling/", f"{prefix}MAPHead_0/"),
        ]
    return entries


def _modules(names: Mapping[str, str], ours: str = "", theirs: str = "") -> Table:
    """Maps modules of Flax, whose parameters have the same names there."""
    return [
        Entry(f"{ours}{path}/{parameter}", f"{theirs}{name}/{parameter}")
        for path, name in names.items()
        for parameter in ("kernel", "scale", "bias")
    ]


def _read(path: Path, like: Module | None = None) -> Imported:
    """Reads an .npz, or the only one in a folder. An image tower alone becomes one of ours.

    `like` supplies a grid of patches that is not square, and the special tokens of texts.
    """
    weights = files.find_weights(path, (FILE,))
    notes = [
        "pixels are taken to be in [-1, 1], as big_vision's value_range(-1, 1) gives them, and "
        "images are squashed bicubically (the file does not say how they were)"
    ]
    tensors = _todays_names(files.load_tensors(weights), notes)
    prefix = "img/" if any(key.startswith(("img/", "txt/")) for key in tensors) else ""
    if not prefix:
        tensors = _without(tensors, sorted(set(CLASSIFIER) & tensors.keys()), "the tower", notes)
    module, tensors = _image(tensors, prefix, like, weights)
    if prefix:
        heads = {
            name: "linear_bias" if f"{name}/head/kernel" in tensors else "none" for name in TOWERS
        }
        embed_dim = module.width
        if heads["img"] != "none":
            embed_dim = base.shape_of(tensors, "img/head/kernel", 2, weights)[1]
        module = DualEncoder(
            image=module,
            text=_text(tensors, like, weights),
            embed_dim=embed_dim,
            # SigLIP's initial values (Zhai et al. 2023, alg. 1). The file has the trained ones.
            logit_scale_init=float(np.log(10)),
            logit_bias_init=-10.0 if "b" in tensors else None,
            image_head=heads["img"],
            text_head=heads["txt"],
        )
    params = from_theirs(table(prefix), tensors, expected_shapes(module), weights)
    return Imported(module, params, notes)


def _check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that big_vision cannot express.

    A head without a bias can be expressed: it is written with a bias of zeros.
    """
    pair, image = "text" in module.towers(), image_of(module)
    poolings = ("cls", "map", "mean") if pair else ("cls", "map", "mean", "none")
    required = {**IMAGE_HAS, "pooling": poolings, "class_token": (image.pooling == "cls",)}
    problems = base.requirements(MODEL, "image", image, required)
    if pair:
        problems += base.requirements(MODEL, "text", module.text, TEXT_HAS)
        pixels = module.pixels
        if pixels != Pixels():
            problems.append(
                f"{MODEL} takes pixels in [-1, 1], which is image_mean and image_std 0.5, not "
                f"{pixels.mean} and {pixels.std}"
            )
    return problems


def _write(module: Module, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes an .npz with separate layers, and with "params/" before every key."""
    pair = "text" in module.towers()
    vit, params = base.with_position_table(image_of(module), params)
    path = "image/position_embedding"
    if vit.class_token:  # which has no row in big_vision's table
        params["image/class_token"] = params["image/class_token"] + params[path][:1]
        params[path] = params[path][1:]
    if pair:
        for name, head in (("image", module.image_head), ("text", module.text_head)):
            if head == "linear":
                params[f"{name}_projection/bias"] = np.zeros(module.embed_dim, np.float32)
    tensors = to_theirs(table("img/" if pair else ""), params)
    named = {f"params/{key}": np.array(x, order="C") for key, x in tensors.items()}
    return [files.save_npz(named, directory / FILE)]


def _todays_names(tensors: Tensors, notes: list[str]) -> Tensors:
    """Selects a checkpoint's parameters, with separate layers and the names of today's models."""
    if any(key.startswith("params/") for key in tensors):
        others = sorted(key for key in tensors if not key.startswith("params/"))
        tensors = _without(tensors, others, "a model", notes)
        tensors = {key.removeprefix("params/"): x for key, x in tensors.items()}
    renamed: Tensors = {}
    for key, x in tensors.items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        if "/encoderblock/" in key:
            # `scan` stacks the layers along the first axis.
            for i, layer in enumerate(x):
                renamed[key.replace("/encoderblock/", f"/encoderblock_{i}/")] = layer
        else:
            renamed[key] = x
    extra = renamed.pop("txt/Encoder_0/pos_embedding", None)
    # Old models added positions twice by mistake; big_vision joins them too (`load` in
    # text_transformer.py).
    if extra is not None:
        renamed["txt/pos_embedding"] = renamed["txt/pos_embedding"] + extra
    return renamed


def _without(tensors: Tensors, keys: list[str], what: str, notes: list[str]) -> Tensors:
    """Leaves tensors out, and notes them."""
    if keys:
        notes.append(f"left out, since {what} has no place for them: {shorten(keys)}")
    return {key: x for key, x in tensors.items() if key not in keys}


def _image(
    tensors: Tensors, prefix: str, like: Module | None, where: Path
) -> tuple[VisionTransformer, Tensors]:
    """Makes the image tower; returns it, and tensors with a position table for patches alone."""
    patch, _, _, width = base.shape_of(tensors, f"{prefix}embedding/kernel", 4, where)
    table, token = f"{prefix}pos_embedding", f"{prefix}cls"
    rows = base.shape_of(tensors, table, 3, where)[1]
    ours = None if like is None else image_of(like).patches

    def fits(patches: int) -> bool:
        return patches == ours or round(patches**0.5) ** 2 == patches

    # 197 rows are 14 x 14 patches and a class token; 196 rows are patches alone.
    with_class = rows > 1 and fits(rows - 1) and not fits(rows)
    grid = base.grid_of(rows - with_class, like, where)
    class_token, pooled = token in tensors, f"{prefix}MAPHead_0/probe" in tensors
    if class_token and pooled:
        raise UserError(f"{where} has both {token} and {prefix}MAPHead_0, as no model has")
    if with_class:  # the position of the class token is added to the token itself
        positions, tensors = tensors[table], dict(tensors)
        tensors[table] = positions[:, 1:]
        if class_token:
            tensors[token] = tensors[token] + positions[:, :1]
    return base.tower(
        VisionTransformer,
        where,
        image_size=(grid[0] * patch, grid[1] * patch),
        patch_size=patch,
        pooling="map" if pooled else "cls" if class_token else "mean",
        class_token=class_token,
        class_position=not class_token,
        **_sizes(tensors, f"{prefix}Transformer", width, where),
    ), tensors


def _text(tensors: Tensors, like: Module | None, where: Path) -> TextTransformer:
    vocab_size, width = base.shape_of(tensors, "txt/Embed_0/embedding", 2, where)
    ids = {"eos_id": 1, "pad_id": 1}  # its texts are padded with eos ("sticky"), which is 1
    if isinstance(like, DualEncoder):
        ids = {"eos_id": like.text.eos_id, "pad_id": like.text.pad_id}
    return base.tower(
        TextTransformer,
        where,
        vocab_size=vocab_size,
        context_length=base.shape_of(tensors, "txt/pos_embedding", 3, where)[1],
        causal=False,
        pooling="map" if "txt/MAPHead_0/probe" in tensors else "last",
        **ids,
        **_sizes(tensors, "txt/Encoder_0", width, where),
    )


def _sizes(tensors: Tensors, encoder: str, width: int, where: Path) -> dict[str, int]:
    block = f"{encoder}/encoderblock_"
    # Its kernel is [width, heads, head_dim], as in Flax.
    query = f"{block}0/MultiHeadDotProductAttention_0/query/kernel"
    return {
        "width": width,
        "depth": len({key[len(block) :].split("/")[0] for key in tensors if key.startswith(block)}),
        "mlp_dim": base.shape_of(tensors, f"{block}0/MlpBlock_0/Dense_0/kernel", 2, where)[1],
        "heads": base.shape_of(tensors, query, 3, where)[1],
    }


FORMAT = Format(
    (DualEncoder, VisionTransformer),
    'numpy.load("{}/model.npz")',
    ("float32",),  # .npz cannot store bfloat16
    *(_read, _check, _write),
)

"""Hugging Face `ViTModel` and `ViTMAEForPreTraining`: config.json, weights, image processor.

Source: transformers, modeling_vit.py, modeling_vit_mae.py and the configurations beside them.

- Written names are transformers 4's, which version 5 reads too; names of both versions are read.
- A written ViTModel has no pooling layer: load it by `ViTModel.from_pretrained(path,
  add_pooling_layer=False)`. The feature is the class token of `last_hidden_state`. On reading, a
  classifier or a pooling layer is left out.
- Both position tables of a ViTMAEForPreTraining are always in the file, because versions of the
  library compute different sines and cosines.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_common, hf_images
from vlp_jax.interop.base import PLAIN_TOWER, Extras, Format, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.hf_common import VIT_LAYERS
from vlp_jax.interop.tables import BATCHED, Entry, Table, from_theirs, modules, shorten, to_theirs
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder
from vlp_jax.models.positions import sincos_2d
from vlp_jax.models.values import IMAGENET
from vlp_jax.models.vit import VisionTransformer

VIT, MAE = ("ViTModel", "vit"), ("ViTMAEForPreTraining", "vit_mae")  # class and `model_type`


def _encoder(prefix: str = "") -> Table:
    embeddings, norm = f"{prefix}embeddings", f"{prefix}layernorm"
    return [
        Entry("image/class_token", f"{embeddings}.cls_token", BATCHED),
        Entry("image/position_embedding", f"{embeddings}.position_embeddings", BATCHED),
        *modules(
            {"patch_embedding/projection": "patch_embeddings.projection"}, "image", embeddings
        ),
        *modules(VIT_LAYERS, "image/encoder/layers", f"{prefix}encoder.layer.{{i}}"),
        *modules({"encoder/norm": norm, "norm": norm}, "image"),  # one of them, by norm_after_pool
    ]


VIT_TABLE = _encoder()
MAE_TABLE: Table = [
    *_encoder("vit."),
    Entry("decoder/mask_token", "decoder.mask_token", BATCHED),
    Entry("decoder/position_embedding", "decoder.decoder_pos_embed", BATCHED),
    *modules(VIT_LAYERS, "decoder/encoder/layers", "decoder.decoder_layers.{i}"),
    *modules(
        {
            "embedding": "decoder_embed",
            "encoder/norm": "decoder_norm",
            "prediction": "decoder_pred",
        },
        "decoder",
        "decoder",
    ),
]
LEFT_OUT = re.compile(r"pooler\..*|classifier\..*|decoder\..*|embeddings\.mask_token")

# Names in transformers 5, in memory and in files -> names in transformers 4.
RENAMED = (
    (r"^(vit\.)?layers\.", r"\1encoder.layer."),
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"attention\.q_proj\.", "attention.attention.query."),
    (r"attention\.k_proj\.", "attention.attention.key."),
    (r"attention\.v_proj\.", "attention.attention.value."),
    (r"attention\.o_proj\.", "attention.output.dense."),
    (r"mlp\.fc1\.", "intermediate.dense."),
    (r"mlp\.fc2\.", "output.dense."),
)

# Defaults of ViTConfig and ViTMAEConfig: a config.json may omit them.
VIT_DEFAULTS = {
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
MAE_DEFAULTS = {
    **VIT_DEFAULTS,
    "decoder_num_attention_heads": 16,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_intermediate_size": 2048,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
SAME_TABLE = 1e-5  # a table this close to the fixed sines and cosines counts as fixed

# Values of our fields that the class can express.
IMAGE_HAS = {
    "pooling": ("cls", "none"),
    "class_token": (True,),
    "patch_bias": (True,),
    "pre_norm": (False,),
    **PLAIN_TOWER,
}


def _read_vit(path: Path, like: Module | None = None) -> Imported:
    weights, where, config = hf_common.open_folder(path, VIT[1], VIT_DEFAULTS)
    notes: list[str] = []
    fields = {"pooling": "cls", "norm_after_pool": base.norm_after_pool_of(like)}
    module = hf_common.image_tower(config, where, notes, square=False, **fields)
    size = base.pair(config["image_size"], "image_size", where)
    extras = hf_images.read(weights.parent, "ViT", size, like, notes)
    notes.append(
        f"images are normalized with mean {extras['image_mean']}, std {extras['image_std']}"
    )
    # ViTForImageClassification adds the prefix.
    named = {key.removeprefix("vit."): x for key, x in files.load_tensors(weights).items()}
    tensors = _names_of_4(named)
    left_out = sorted(filter(LEFT_OUT.fullmatch, tensors))
    if left_out:
        notes.append(f"left out, since the tower has no place for them: {shorten(left_out)}")
    tensors = {key: x for key, x in tensors.items() if key not in left_out}
    params = from_theirs(VIT_TABLE, tensors, expected_shapes(module), weights)
    return Imported(module, params, notes, extras)


def _check_vit(module: Module, extras: Extras) -> list[str]:
    return [
        *base.requirements(VIT[0], "image", module, IMAGE_HAS),
        *hf_images.problems(VIT[0], extras),
    ]


def _write_vit(
    module: VisionTransformer, params: Params, directory: Path, extras: Extras
) -> list[Path]:
    image, params = base.with_position_table(module, params)
    config, tensors = _config(image), to_theirs(VIT_TABLE, params)
    return hf_common.write_folder(VIT, config, tensors, module, directory, extras, "ViT")


def _read_mae(path: Path, like: Module | None = None) -> Imported:
    weights, where, config = hf_common.open_folder(path, MAE[1], MAE_DEFAULTS)
    notes: list[str] = []
    size = base.pair(config["image_size"], "image_size", where)
    imagenet = {"image_mean": IMAGENET.mean, "image_std": IMAGENET.std}
    extras = hf_images.read(weights.parent, "ViT", size, like, notes, **imagenet)
    extras["norm_pix_loss"] = bool(config["norm_pix_loss"])
    extras["mask_ratio"] = base.number(config, "mask_ratio", where)
    image = hf_common.image_tower(config, where, notes, pooling="none")
    decoder = base.tower(
        MaskedDecoder,
        where,
        grid=image.grid,
        class_token=True,
        outputs=3 * image.patch_size**2,
        position="learned",
        **hf_common.encoder_fields(config, where, "decoder_"),
    )
    module = MaskedAutoencoder(image, decoder, hf_images.normalization(extras))
    notes.append(
        f"it was trained with norm_pix_loss {extras['norm_pix_loss']} and mask_ratio "
        f"{config['mask_ratio']}"
    )
    tensors = files.load_tensors(weights)
    if not any(key.startswith("decoder.") for key in tensors):
        raise UserError(f"{weights} is an encoder without its decoder, which cannot be read here")
    params = from_theirs(MAE_TABLE, _names_of_4(tensors), expected_shapes(module), weights)
    return Imported(*_with_fixed_positions(module, params), notes, extras)


def _check_mae(module: Module, extras: Extras) -> list[str]:
    image, decoder = module.image, module.decoder
    problems = [
        *base.requirements(MAE[0], "image", image, {**IMAGE_HAS, "pooling": ("none",)}),
        *base.square_problems(MAE[0], image),
        *base.requirements(MAE[0], "decoder", decoder, {"class_token": (True,)}),
        *hf_images.problems(MAE[0], extras),
    ]
    # The config has one value for encoder and decoder.
    for field in ("activation", "norm_eps"):
        a, b = (getattr(tower.transformer, field) for tower in (image, decoder))
        if a != b:
            problems.append(f"{MAE[0]} has one {field}, not {a!r} (image) and {b!r} (decoder)")
    return problems


def _write_mae(
    module: MaskedAutoencoder, params: Params, directory: Path, extras: Extras
) -> list[Path]:
    image, params = base.with_position_table(module.image, params)
    if module.decoder.position == "sincos":
        params["decoder/position_embedding"] = _sines(module.decoder)
    config = {
        # Both give hidden_act and layer_norm_eps without a prefix; `check` has found them equal.
        **hf_common.encoder_config(module.decoder, "decoder_"),
        **_config(image),
        "mask_ratio": extras.mask_ratio,
        "norm_pix_loss": extras.norm_pix_loss,
    }
    tensors = to_theirs(MAE_TABLE, params)
    return hf_common.write_folder(MAE, config, tensors, module, directory, extras, "ViT")


def _config(image: VisionTransformer) -> dict[str, object]:
    return {**hf_common.image_config(image), "qkv_bias": True}


def _with_fixed_positions(
    module: MaskedAutoencoder, params: Params
) -> tuple[MaskedAutoencoder, Params]:
    """Replaces learned positions by fixed ones in towers whose tables are the fixed ones."""
    towers = {}
    for name in ("image", "decoder"):
        tower, path = getattr(module, name), f"{name}/position_embedding"
        # Without the test of the width, `sincos_2d` would raise: 4 must divide it.
        if tower.transformer.width % 4 == 0 and np.allclose(
            params[path], _sines(tower), 0, SAME_TABLE
        ):
            towers[name] = tower.clone(position="sincos")
            del params[path]
    return module.clone(**towers), params


def _sines(tower: VisionTransformer | MaskedDecoder) -> np.ndarray:
    """Makes the fixed table, with a row of zeros for the class token."""
    return np.pad(sincos_2d(tower.grid, tower.transformer.width), ((1, 0), (0, 0)))


def _names_of_4(tensors: Tensors) -> Tensors:
    renamed = {}
    for key, x in tensors.items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        renamed[key] = x
    return renamed


VIT_FORMAT = Format(
    (VisionTransformer,),
    'transformers.ViTModel.from_pretrained("{}", add_pooling_layer=False)',
    hf_common.HOLDS,
    *(_read_vit, _check_vit, _write_vit),
)
MAE_FORMAT = Format(
    (MaskedAutoencoder,),
    'transformers.ViTMAEForPreTraining.from_pretrained("{}")',
    hf_common.HOLDS,
    *(_read_mae, _check_mae, _write_mae),
)

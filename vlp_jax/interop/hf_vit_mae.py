"""Hugging Face `ViTMAEForPreTraining`: config.json, model.safetensors, preprocessor_config.json.

Source: transformers, models/vit_mae/modeling_vit_mae.py and configuration_vit_mae.py. Written names
are transformers 4's, which version 5 reads too; names of both versions are read. Both position
tables are always in the file, because versions of the library compute different sines and cosines.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_common, hf_images, hf_vit
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.tables import (
    BATCHED,
    Entry,
    Table,
    convolution,
    from_theirs,
    linear,
    norm,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.masked_autoencoder import MaskedAutoencoder, MaskedDecoder
from vlp_jax.models.positions import sincos_2d
from vlp_jax.models.values import IMAGENET, Pixels
from vlp_jax.models.vit import VisionTransformer

MODEL = "ViTMAEForPreTraining"
KINDS = (MaskedAutoencoder,)
LOADED_BY = 'transformers.ViTMAEForPreTraining.from_pretrained("{}")'
HOLDS = ("float32", "bfloat16")

TABLE: Table = [
    Entry("image/class_token", "vit.embeddings.cls_token", BATCHED),
    Entry("image/position_embedding", "vit.embeddings.position_embeddings", BATCHED),
    *convolution("image/patch_embedding/projection", "vit.embeddings.patch_embeddings.projection"),
    *hf_common.layers_as_in_vit("image/encoder/layers", "vit.encoder.layer.{i}"),
    *norm("image/encoder/norm", "vit.layernorm"),
    Entry("decoder/mask_token", "decoder.mask_token", BATCHED),
    Entry("decoder/position_embedding", "decoder.decoder_pos_embed", BATCHED),
    *linear("decoder/embedding", "decoder.decoder_embed"),
    *hf_common.layers_as_in_vit("decoder/encoder/layers", "decoder.decoder_layers.{i}"),
    *norm("decoder/encoder/norm", "decoder.decoder_norm"),
    *linear("decoder/prediction", "decoder.decoder_pred"),
]

# Names in transformers 5, in memory and in files -> names in transformers 4.
RENAMED = (
    (r"^decoder\.decoder_encoder\.layer\.", "decoder.decoder_layers."),
    (r"^vit\.layers\.", "vit.encoder.layer."),
    *hf_vit.RENAMED[1:],
)

# Defaults of ViTMAEConfig: a config.json may omit them.
DEFAULTS = {
    **hf_vit.DEFAULTS,
    "decoder_num_attention_heads": 16,
    "decoder_hidden_size": 512,
    "decoder_num_hidden_layers": 8,
    "decoder_intermediate_size": 2048,
    "mask_ratio": 0.75,
    "norm_pix_loss": False,
}
SAME_TABLE = 1e-5  # a table this close to the fixed sines and cosines counts as fixed

IMAGE_HAS = {**hf_vit.IMAGE_HAS, "pooling": ("none",)}


def read(path: Path, like: Module | None = None) -> Imported:
    """Reads a folder or its file of weights.

    Raises:
      UserError: the files hold no ViTMAEForPreTraining that can be expressed here.
    """
    weights, config = hf_common.open_folder(path, "vit_mae")
    where, notes = weights.parent / "config.json", []
    config = hf_common.with_defaults(config, DEFAULTS)
    side = base.one_side(config["image_size"], "image_size", where)
    imagenet = {"image_mean": IMAGENET.mean, "image_std": IMAGENET.std}
    extras = hf_images.read(weights.parent, "ViT", (side, side), like, notes, **imagenet)
    module = _module(config, where, hf_images.normalization(extras), notes)
    notes.append(
        f"it was trained with norm_pix_loss {bool(config['norm_pix_loss'])} and mask_ratio "
        f"{config['mask_ratio']}"
    )
    tensors = _names_of_4(files.load_tensors(weights), weights)
    params = from_theirs(TABLE, tensors, expected_shapes(module), weights)
    extras |= {
        "norm_pix_loss": bool(config["norm_pix_loss"]),
        "mask_ratio": base.number(config, "mask_ratio", where),
    }
    return Imported(*_with_fixed_positions(module, params), notes, extras)


def check(module: Module, extras: Extras) -> list[str]:
    """Returns a line for each property of a module that ViTMAEForPreTraining cannot express."""
    image, decoder = module.image, module.decoder
    problems = [
        *base.requirements(MODEL, "image", image, IMAGE_HAS),
        *base.square_problems(MODEL, image),
        *base.requirements(MODEL, "decoder", decoder, {"class_token": (True,)}),
        *hf_images.problems(MODEL, extras),
    ]
    # The config has one value for encoder and decoder.
    for field in ("activation", "norm_eps"):
        a, b = (getattr(tower.transformer, field) for tower in (image, decoder))
        if a != b:
            problems.append(f"{MODEL} has one {field}, not {a!r} (image) and {b!r} (decoder)")
    return problems


def write(module: MaskedAutoencoder, params: Params, directory: Path, extras: Extras) -> list[Path]:
    """Writes a folder for `ViTMAEForPreTraining.from_pretrained`."""
    image, params = base.with_position_table(module.image, params)
    decoder = module.decoder
    if decoder.position == "sincos":
        params["decoder/position_embedding"] = _sines(decoder)
    config = {
        "architectures": [MODEL],
        "model_type": "vit_mae",
        "torch_dtype": extras.weights,
        # Both give hidden_act and layer_norm_eps without a prefix; `check` has found them equal.
        **hf_common.encoder_config(decoder, "decoder_"),
        **hf_common.encoder_config(image),
        "image_size": image.image_size[0],
        "patch_size": image.patch_size,
        "num_channels": 3,
        "qkv_bias": True,
        "mask_ratio": extras.mask_ratio,
        "norm_pix_loss": extras.norm_pix_loss,
    }
    return [
        files.save_json(config, directory / "config.json"),
        files.save_safetensors(
            to_theirs(TABLE, params), directory / "model.safetensors", extras.narrow
        ),
        hf_images.write(module, directory, extras, "ViTImageProcessor"),
    ]


def _module(
    config: dict[str, Any], where: Path, pixels: Pixels, notes: list[str]
) -> MaskedAutoencoder:
    """Makes the model that a config describes, with learned positions."""
    hf_common.three_channels(config, where)
    hf_common.biased_attention(config, where)
    patch = base.one_side(config["patch_size"], "patch_size", where)
    side = base.one_side(config["image_size"], "image_size", where)
    image = base.tower(
        VisionTransformer,
        where,
        image_size=base.tiled((side, side), patch, notes),
        patch_size=patch,
        pooling="none",
        **hf_common.encoder_fields(config, where),
    )
    decoder = base.tower(
        MaskedDecoder,
        where,
        grid=image.grid,
        class_token=True,
        outputs=3 * patch**2,
        position="learned",
        **hf_common.encoder_fields(config, where, "decoder_"),
    )
    return MaskedAutoencoder(image, decoder, pixels)


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


def _names_of_4(tensors: Tensors, where: Path) -> Tensors:
    if not any(key.startswith("decoder.") for key in tensors):
        raise UserError(f"{where} is an encoder without its decoder, which cannot be read here")
    renamed = {}
    for key, x in tensors.items():
        for pattern, name in RENAMED:
            key = re.sub(pattern, name, key)
        renamed[key] = x
    return renamed

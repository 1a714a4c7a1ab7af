"""Hugging Face `CLIPModel` and `SiglipModel`: config.json, weights, image processor, tokenizer.

Source: transformers, modeling_clip.py, modeling_siglip.py and the configurations beside them.

- CLIP pools texts at the first `eos_token_id`. But `eos_token_id` 2, as in the first published
  configs, means pooling at the highest id. The norm after its image encoder is applied to the class
  token alone, which is the same as a norm of all tokens before the pooling.
- SigLIP pools texts at the last position, padding or not. The projection to queries, keys and
  values is one tensor in the image tower's head, and three tensors in every encoder. Checkpoints of
  SigLIP 2 with a fixed resolution have this class too; NaFlex checkpoints ("siglip2") do not.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base, files, hf_common, hf_images
from vlp_jax.interop.base import PLAIN_TEXT, PLAIN_TOWER, Extras, Format, Imported
from vlp_jax.interop.hf_common import CLIP_LAYERS
from vlp_jax.interop.hf_tokenizer import TokenizerFiles
from vlp_jax.interop.tables import (
    BATCHED,
    SCALAR,
    SQUEEZED,
    Entry,
    Table,
    from_theirs,
    fused,
    modules,
    to_theirs,
)
from vlp_jax.interop.trees import Module, Params, expected_shapes
from vlp_jax.models.dual_encoder import DualEncoder
from vlp_jax.models.text import TextTransformer

HIGHEST_ID = 2  # CLIP's eos_token_id that means "pool at the highest id"
# Position ids are the numbers 0, 1, 2, ..., which old versions saved as a buffer.
IGNORED = r"(text|vision)_model\.embeddings\.position_ids"

_TOWERS: Table = [
    Entry("image/position_embedding", "vision_model.embeddings.position_embedding.weight"),
    Entry("text/token_embedding/embedding", "text_model.embeddings.token_embedding.weight"),
    Entry("text/position_embedding", "text_model.embeddings.position_embedding.weight"),
    *modules(CLIP_LAYERS, "image/encoder/layers", "vision_model.encoder.layers.{i}"),
    *modules(CLIP_LAYERS, "text/encoder/layers", "text_model.encoder.layers.{i}"),
    *modules(
        {
            "image/patch_embedding/projection": "vision_model.embeddings.patch_embedding",
            "image/encoder/norm": "vision_model.post_layernorm",
            "text/encoder/norm": "text_model.final_layer_norm",
        }
    ),
]
_BASE = {
    **{"hidden_size": 768, "num_hidden_layers": 12},
    **{"intermediate_size": 3072, "num_attention_heads": 12},
}
_VISION = {**_BASE, "num_channels": 3, "image_size": 224}
_IDS = {"pad_token_id": 1, "eos_token_id": 49407}
_QUICK = {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-5}
_TANH = {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}


@dataclasses.dataclass(frozen=True)
class TwoTowers:
    """A class of `transformers` with an image and a text tower.

    Attributes:
      name, model_type: the class, and the word for it in a config.
      table: the mapping of all its tensors.
      defaults, vision, text: defaults of its config and of the two sections, which files may omit.
      image_has, text_has, whole_has: values of our fields that it can express; the first is read.
      projection: the key of the text section with the width of embeddings.
      tokenizer_gives: the tokenizer's outputs that it takes.
    """

    name: str
    model_type: str
    table: Table
    defaults: Mapping[str, Any]
    vision: Mapping[str, Any]
    text: Mapping[str, Any]
    image_has: Mapping[str, tuple[Any, ...]]
    text_has: Mapping[str, tuple[Any, ...]]
    whole_has: Mapping[str, tuple[Any, ...]]
    projection: str
    tokenizer_gives: tuple[str, ...]

    @property
    def word(self) -> str:
        """The word that its tokenizer and its image processor begin with."""
        return self.name.removesuffix("Model")

    @property
    def format(self) -> Format:
        """The format of weights."""
        loaded_by = f'transformers.{self.name}.from_pretrained("{{}}")'
        parts = (functools.partial(function, self) for function in (_read, _check, _write))
        return Format((DualEncoder,), loaded_by, hf_common.HOLDS, *parts)


CLIP = TwoTowers(
    name="CLIPModel",
    model_type="clip",
    table=[
        *_TOWERS,
        Entry("logit_scale", "logit_scale"),
        Entry("image/class_token", "vision_model.embeddings.class_embedding", SQUEEZED),
        *modules(
            {
                "image/pre_norm": "vision_model.pre_layrnorm",  # transformers spells it this way
                "image/norm": "vision_model.post_layernorm",  # with norm_after_pool
                "image_projection": "visual_projection",
                "text_projection": "text_projection",
            }
        ),
    ],
    defaults={"projection_dim": 512, "logit_scale_init_value": 2.6592},  # ln(1 / 0.07)
    vision={**_VISION, **_QUICK, "patch_size": 32},
    text={
        **{"vocab_size": 49408, "max_position_embeddings": 77, **_IDS, **_QUICK},
        **{"hidden_size": 512, "num_hidden_layers": 12},
        **{"intermediate_size": 2048, "num_attention_heads": 8},
    },
    image_has={
        "pooling": ("cls",),
        "class_token": (True,),
        "patch_bias": (False,),
        "pre_norm": (True,),
        **PLAIN_TOWER,
    },
    text_has={"causal": (True,), "pooling": ("eos", "argmax"), **PLAIN_TEXT},
    whole_has={"image_head": ("linear",), "text_head": ("linear",), "logit_bias_init": (None,)},
    projection="projection_dim",
    tokenizer_gives=("input_ids", "attention_mask"),
)
SIGLIP = TwoTowers(
    name="SiglipModel",
    model_type="siglip",
    table=[
        *_TOWERS,
        Entry("logit_scale", "logit_scale", SCALAR),
        Entry("logit_bias", "logit_bias", SCALAR),
        Entry("image/pooling/probe", "vision_model.head.probe", BATCHED),
        *fused(
            "image/pooling/attention",
            "vision_model.head.attention.in_proj_weight",
            "vision_model.head.attention.in_proj_bias",
        ),
        *modules(
            {
                "attention/out": "attention.out_proj",
                "norm": "layernorm",
                "mlp/up": "mlp.fc1",
                "mlp/down": "mlp.fc2",
            },
            "image/pooling",
            "vision_model.head",
        ),
        *modules({"text_projection": "text_model.head"}),
    ],
    defaults={},
    vision={**_VISION, **_TANH, "patch_size": 16, "vision_use_head": True},
    text={**_BASE, "vocab_size": 32000, "max_position_embeddings": 64, **_IDS, **_TANH},
    image_has={
        "pooling": ("map",),
        "class_token": (False,),
        "patch_bias": (True,),
        "pre_norm": (False,),
        "norm_after_pool": (False,),
        **PLAIN_TOWER,
    },
    text_has={"causal": (False,), "pooling": ("last",), **PLAIN_TEXT},
    # A head or logits without a bias can be expressed too: they are written with a bias of zero.
    whole_has={"image_head": ("none",), "text_head": ("linear_bias", "linear")},
    projection="projection_size",
    tokenizer_gives=("input_ids",),  # no attention_mask: padding is seen like every token
)


def _read(kind: TwoTowers, path: Path, like: Module | None = None) -> Imported:
    weights, where, config = hf_common.open_folder(path, kind.model_type, kind.defaults)
    notes: list[str] = []
    text = hf_common.section(config, "text_config", kind.text, where)
    vision = hf_common.section(config, "vision_config", kind.vision, where)
    if not vision.get("vision_use_head", True):
        raise UserError(f"{where}: vision_use_head is false: the images are not pooled")
    fields, whole = base.first(kind.image_has), base.first(kind.whole_has)
    if kind is CLIP:
        fields["norm_after_pool"] = base.norm_after_pool_of(like)
        whole["embed_dim"] = base.integer(config, "projection_dim", where)
        whole["logit_scale_init"] = base.number(config, "logit_scale_init_value", where)
    else:  # initial values of Zhai et al. 2023, 3.2
        whole |= {"embed_dim": vision["hidden_size"], "logit_scale_init": math.log(10)}
        whole["logit_bias_init"] = -10.0
    image = hf_common.image_tower(vision, where, notes, **fields)
    size = base.pair(vision["image_size"], "image_size", where)
    extras = hf_images.read(weights.parent, kind.word, size, like, notes)
    module = DualEncoder(
        image=image, text=_text(kind, text, where), **whole, pixels=hf_images.normalization(extras)
    )
    tensors = files.load_tensors(weights)
    params = from_theirs(kind.table, tensors, expected_shapes(module), weights, IGNORED)
    ids = {f"{name}_id": text.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    extras |= {name: x for name, x in ids.items() if type(x) is int}
    if module.text.pooling == "argmax":
        extras.pop("eos_id")  # a 2 that stands for the pooling, not the tokenizer's id
    tokenizer = TokenizerFiles.from_folder(weights.parent, kind=f"{kind.word}Tokenizer")
    return Imported(module, params, notes, {**extras, "tokenizer": tokenizer})


def _text(kind: TwoTowers, config: dict[str, Any], where: Path) -> TextTransformer:
    fields = base.first(kind.text_has)
    vocab_size = base.integer(config, "vocab_size", where)
    ids = {name: config.get(f"{name}_token_id") for name in ("eos", "pad")}
    if kind is CLIP and type(ids["eos"]) is not int:
        raise UserError(f"{where}: eos_token_id is {ids['eos']!r}; only one number can be read")
    if kind is CLIP and ids["eos"] == HIGHEST_ID:
        # In CLIP's vocabulary the last id is the end of text.
        fields["pooling"], ids["eos"] = "argmax", vocab_size - 1
    # A config may name no id or several; then nothing reads it.
    fields |= {f"{name}_id": x if type(x) is int else 0 for name, x in ids.items()}
    return base.tower(
        TextTransformer,
        where,
        vocab_size=vocab_size,
        context_length=base.integer(config, "max_position_embeddings", where),
        **fields,
        **hf_common.encoder_fields(config, where),
    )


def _check(kind: TwoTowers, module: Module, extras: Extras) -> list[str]:
    text = module.text
    problems = [
        *base.requirements(kind.name, "image", module.image, kind.image_has),
        *base.square_problems(kind.name, module.image),
        *base.requirements(kind.name, "text", text, kind.text_has),
        *base.requirements(kind.name, "", module, kind.whole_has),
        *hf_images.problems(kind.name, extras),
    ]
    if kind is CLIP and text.pooling == "eos":
        if text.eos_id == HIGHEST_ID:
            problems.append(
                f"{kind.name} takes eos_token_id {HIGHEST_ID} for pooling at the highest id, so it "
                f"cannot pool at the first id {HIGHEST_ID}, which is this model's text.eos_id"
            )
        problems += base.eos_problems(text, extras)
    return problems


def _write(
    kind: TwoTowers, module: DualEncoder, params: Params, directory: Path, extras: Extras
) -> list[Path]:
    image, params = base.with_position_table(module.image, params)
    text, width, whole = module.text, {}, {}
    ids = base.special_ids(text, extras)
    if kind is CLIP:
        width = {"projection_dim": module.embed_dim}
        whole = {**width, "logit_scale_init_value": module.logit_scale_init}
        ids |= {"eos_id": HIGHEST_ID} if text.pooling == "argmax" else {}
    else:
        params.setdefault("logit_bias", np.zeros((), np.float32))
        params.setdefault("text_projection/bias", np.zeros(module.embed_dim, np.float32))
    config = {
        **whole,
        "vision_config": {
            "model_type": f"{kind.model_type}_vision_model",
            **hf_common.image_config(image),
            **width,
        },
        "text_config": {
            "model_type": f"{kind.model_type}_text_model",
            **hf_common.encoder_config(text),
            kind.projection: module.embed_dim,
            "vocab_size": text.vocab_size,
            "max_position_embeddings": text.context_length,
            **{name.replace("_id", "_token_id"): value for name, value in ids.items()},
        },
    }
    return hf_common.write_folder(
        (kind.name, kind.model_type),
        config,
        to_theirs(kind.table, params),
        module,
        directory,
        extras,
        kind.word,
        kind.tokenizer_gives,
    )

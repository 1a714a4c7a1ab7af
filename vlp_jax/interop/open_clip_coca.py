"""open_clip's CoCa: a config with `multimodal_cfg` beside the sections of the two towers.

Source: open_clip_torch 3.3, coca_model.py. Keys of the text tower begin with "text.". The layers of
the decoder are two lists, `text_decoder.resblocks` and `text_decoder.cross_attn`.

open_clip reads only width, heads, layers, context_length and ls_init_value from `multimodal_cfg`.
So the decoder's MLP is always four times as wide, its norms have PyTorch's epsilon, and its
activation is the quick GELU or the erf GELU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base
from vlp_jax.interop.base import Extras
from vlp_jax.interop.files import Tensors
from vlp_jax.interop.hf_tokenizer import CONFIG, TOKENIZER, TokenizerFiles
from vlp_jax.interop.open_clip_config import (
    EPS,
    TEXT_HEADS,
    activation_and_eps,
    image_fields,
    layer_sizes,
    layers_config,
    native_config,
    refuse_unless,
    resize_problems,
    text_sizes,
    told_by,
)
from vlp_jax.interop.open_clip_table import layers, native_tower
from vlp_jax.interop.tables import (
    HEADS_IN,
    SQUEEZED,
    Entry,
    Table,
    fused,
    heads_out,
    norm,
)
from vlp_jax.interop.trees import Module
from vlp_jax.models.coca import CoCa, CoCaDecoder, CoCaText, check_coca
from vlp_jax.models.values import Pixels

MODEL = "open_clip's CoCa"
SECTION = "multimodal_cfg"
POOLER_HEADS = 8  # default
MLP_RATIO = 4

# Values in a config's sections that a CoCa must have to be expressed here.
HAS_KEYS = {
    "vision_cfg": {
        "attentional_pool": (True,),
        "pool_type": ("tok",),
        "timm_model_name": (None,),
        "scaled_cosine_attn": (False,),
    },
    "text_cfg": {
        "embed_cls": (True,),
        "hf_model_name": (None,),
        "no_causal_mask": (False,),
        "proj_type": ("linear",),
        "proj_bias": (False,),
        "scaled_cosine_attn": (False,),
    },
}
# Keys whose default would make another model, so they must be present.
NEEDED = (("vision_cfg", "attentional_pool"), ("text_cfg", "embed_cls"))
IMAGE_HAS = {
    "pooling": ("none",),
    "norm_after_pool": (True,),
    "class_token": (True,),
    "registers": (0,),
    "patch_bias": (False,),
}
DECODER_HAS = {"qk_norm": (False,), "norm_eps": (EPS,), "activation": ("gelu", "quick_gelu")}


def table(same_width: bool) -> Table:
    """Returns the mapping.

    Args:
      same_width: whether the pooler's queries are as wide as the image's tokens. If so,
        `torch.nn.MultiheadAttention` has one matrix for queries, keys and values; if not, it has
        three. The bias is one tensor in both cases.
    """
    ours, theirs = "pooler/attention", "visual.attn_pool.attn"
    names = ("query", "key", "value")
    weight, bias = fused(ours, names, f"{theirs}.in_proj_weight", f"{theirs}.in_proj_bias")
    apart = [
        # torch names them by their first letter: q_proj_weight, k_proj_weight, v_proj_weight.
        Entry(f"{ours}/{name}/kernel", f"{theirs}.{name[0]}_proj_weight", HEADS_IN)
        for name in names
    ]
    decoder = "decoder/encoder"
    return [
        Entry("logit_scale", "logit_scale"),
        Entry("logit_bias", "logit_bias"),
        *native_tower(),
        Entry("pooler/query", "visual.attn_pool.query"),
        *norm("pooler/norm_query", "visual.attn_pool.ln_q"),
        *norm("pooler/norm_tokens", "visual.attn_pool.ln_k"),
        *([weight] if same_width else apart),
        bias,
        *heads_out(f"{ours}/out", f"{theirs}.out_proj"),
        *norm("pooler/norm", "visual.ln_post"),
        Entry("image_projection/kernel", "visual.proj"),
        Entry("text/token_embedding/embedding", "text.token_embedding.weight"),
        Entry("text/class_token", "text.cls_emb", SQUEEZED),
        Entry("text/position_embedding", "text.positional_embedding"),
        *layers("text/encoder/layers", "text.transformer.resblocks.{i}"),
        *norm("text/norm", "text.ln_final"),
        Entry("text_projection/kernel", "text.text_projection"),
        *layers(f"{decoder}/layers/read", "text_decoder.resblocks.{i}"),
        *layers(f"{decoder}/layers/look", "text_decoder.cross_attn.{i}"),
        *norm(f"{decoder}/layers/look/norm_context", "text_decoder.cross_attn.{i}.ln_1_kv"),
        *norm(f"{decoder}/norm", "text_decoder.ln_final"),
        Entry("decoder/scores/kernel", "text_decoder.text_projection"),
    ]


def table_of(module: CoCa) -> Table:
    """Returns the mapping for a model."""
    return table(module.embed_dim == module.image.width)


def check_config(model: Mapping[str, Any], where: Path) -> None:
    """Raises UserError if a config describes a CoCa that cannot be expressed here."""
    if not isinstance(model[SECTION], dict):
        raise UserError(f"{where}: {SECTION} must be a mapping, not {model[SECTION]!r}")
    for section, key in NEEDED:
        if key not in model[section]:
            raise UserError(f"{where}: a model with {SECTION} needs {section}.{key} true")
    refuse_unless(HAS_KEYS, model, where)


def module_of(
    tensors: Tensors,
    model: Mapping[str, Any],
    like: Module | None,
    tokenizer: TokenizerFiles | None,
    pixels: Pixels,
    where: Path,
    notes: list[str],
) -> CoCa:
    """Makes the model that tensors and a config describe; without a config, `like` helps.

    Args:
      model: the part of the config that describes the model; {} without a config.
      tokenizer: names the token that texts begin with.

    Raises:
      UserError: the CoCa cannot be expressed here, or sizes do not fit each other.
    """
    if model:
        check_config(model, where)
    image = image_fields(tensors, model, like, where, notes)
    queries, embed_dim = base.shape_of(tensors, "visual.attn_pool.query", 2, where)
    heads = {"attn_pooler_heads": POOLER_HEADS, **model.get("vision_cfg", {})}
    module = CoCa(
        image.clone(pooling="none", norm_after_pool=True),
        _text(tensors, model, like, tokenizer, where, notes),
        _decoder(tensors, model, like, where),
        embed_dim,
        logit_scale_init=float(model.get("init_logit_scale", np.log(1 / 0.07))),
        logit_bias_init=-10.0 if "logit_bias" in tensors else None,
        queries=queries,
        pooler_heads=base.integer(heads, "attn_pooler_heads", where)
        if model
        else like.pooler_heads,
        pixels=pixels,
    )
    try:
        check_coca(module)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    return module


def _text(
    tensors: Tensors,
    model: Mapping[str, Any],
    like: Module | None,
    tokenizer: TokenizerFiles | None,
    where: Path,
    notes: list[str],
) -> CoCaText:
    config = model.get("text_cfg")
    vocab_size, width = base.shape_of(tensors, "text.token_embedding.weight", 2, where)
    rows, _ = base.shape_of(tensors, "text.positional_embedding", 2, where)
    if config is None:
        ids = ("bos_id", "eos_id", "pad_id")
        told = told_by(like.text, "heads", "activation", "norm_eps", *ids)
    else:
        bos_id = _bos_id(tokenizer)
        if bos_id is None:
            bos_id = vocab_size - 2  # its place in CLIP's vocabulary
            notes.append(
                f"nothing tells the token that captions begin with: {bos_id}, as in CLIP's"
            )
        told = {
            "heads": base.integer({"heads": TEXT_HEADS, **config}, "heads", where),
            "bos_id": bos_id,
            "eos_id": config.get("eos_id", vocab_size - 1),
            "pad_id": config.get("pad_id", 0),
            **activation_and_eps(model, config, where),
        }
    return base.tower(
        CoCaText,
        where,
        vocab_size=vocab_size,
        # The last row of the table is the class token's.
        context_length=rows - 1,
        width=width,
        **layer_sizes(tensors, "text.transformer.resblocks.", where),
        **told,
    )


def _decoder(
    tensors: Tensors, model: Mapping[str, Any], like: Module | None, where: Path
) -> CoCaDecoder:
    config = model.get(SECTION)
    width, vocab_size = base.shape_of(tensors, "text_decoder.text_projection", 2, where)
    rows, _ = base.shape_of(tensors, "text.positional_embedding", 2, where)
    if config is None:
        told = told_by(like.decoder, "heads", "activation", "norm_eps")
    else:
        told = {
            "heads": base.integer({"heads": TEXT_HEADS, **config}, "heads", where),
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "norm_eps": EPS,
        }
        length = config.get("context_length", 77)
        if length != rows - 1:
            raise UserError(
                f"{where}: {SECTION}.context_length {length!r} is not text_cfg.context_length "
                f"{rows - 1}, which is not supported"
            )
    return base.tower(
        CoCaDecoder,
        where,
        vocab_size=vocab_size,
        context_length=rows - 1,
        width=width,
        **layer_sizes(tensors, "text_decoder.resblocks.", where),
        **told,
    )


def _bos_id(tokenizer: TokenizerFiles | None) -> int | None:
    """Returns the id of the token that a tokenizer's files call bos, or cls as in BERT."""
    if tokenizer is None:
        return None
    config = json.loads(tokenizer.contents.get(CONFIG, b"{}"))
    content = json.loads(tokenizer.contents.get(TOKENIZER, b"{}"))
    ids = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    for name in ("bos_token", "cls_token"):
        token = config.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            return ids[token]
    return None


def check(module: CoCa, extras: Extras) -> list[str]:
    """Returns a line for each property of a CoCa that open_clip cannot express."""
    text, decoder = module.text, module.decoder
    problems = [
        *base.requirements(MODEL, "image", module.image, IMAGE_HAS),
        *base.requirements(MODEL, "text", text, {}),
        *base.requirements(MODEL, "decoder", decoder, DECODER_HAS),
        *resize_problems(module.image, extras),
    ]
    sizes = decoder.transformer
    if sizes.mlp_dim != MLP_RATIO * sizes.width:
        problems.append(
            f"{MODEL} has decoder.mlp_dim {MLP_RATIO * sizes.width}, not {sizes.mlp_dim}"
        )
    if module.embed_dim != sizes.width:
        problems.append(
            f"{MODEL} has embed_dim {sizes.width}, the decoder's width, not {module.embed_dim}"
        )
    quick = {tower.transformer.activation == "quick_gelu" for tower in module.towers().values()}
    if len(quick) > 1:
        problems.append(f"{MODEL} has quick_gelu in all towers or in none")
    for name in ("bos_id", "eos_id", "pad_id"):
        given = getattr(extras, name)
        if given not in (None, getattr(text, name)):
            problems.append(f"{name} {given} is not text.{name} {getattr(text, name)}")
    return problems


def config_of(module: CoCa, extras: Extras, name: str) -> dict[str, Any]:
    """Makes the part of open_clip_config.json that describes the model.

    Args:
      name: see `text_sizes`.
    """
    text, layers_of = module.text, module.decoder.transformer
    scale = {} if layers_of.layer_scale is None else {"ls_init_value": layers_of.layer_scale}
    return {
        "vision_cfg": {
            # The section needs pool_type "tok" (see HAS_KEYS); the last norm is the pooler's.
            **native_config(module.image.clone(pooling="cls", norm_after_pool=False)),
            "attentional_pool": True,
            "attn_pooler_queries": module.queries,
            "attn_pooler_heads": module.pooler_heads,
            "output_tokens": True,
        },
        "text_cfg": {
            **text_sizes(text, extras, name),
            "embed_cls": True,
            "output_tokens": True,
            **layers_config(text),
        },
        SECTION: {
            "context_length": text.context_length,
            "vocab_size": module.decoder.vocab_size,
            "width": layers_of.width,
            "heads": layers_of.heads,
            "layers": layers_of.depth,
            "mlp_ratio": MLP_RATIO,
            **scale,
        },
        "pad_id": text.pad_id,
        "custom_text": True,
    }

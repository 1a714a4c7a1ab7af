"""open_clip's CoCa: a config with `multimodal_cfg` beside the sections of the two towers.

Source: open_clip_torch 3.3, coca_model.py. Keys of the text tower begin with "text.". The layers of
the decoder are two lists, `text_decoder.resblocks` and `text_decoder.cross_attn`.

open_clip reads only width, heads, layers, context_length and ls_init_value from `multimodal_cfg`.
So the decoder's MLP is always four times as wide, its norms have PyTorch's epsilon, and its
activation is the quick GELU or the erf GELU.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from vlp_jax.errors import UserError
from vlp_jax.interop import base
from vlp_jax.interop.base import Extras, Imported
from vlp_jax.interop.hf_tokenizer import CONFIG, TOKENIZER, TokenizerFiles
from vlp_jax.interop.open_clip_common import (
    EPS,
    MULTIMODAL,
    NATIVE_TOWER,
    Source,
    layers,
    layers_config,
    native_config,
    resize_problems,
    text_sizes,
)
from vlp_jax.interop.tables import HEADS_IN, QKV, SQUEEZED, Entry, Table, fused, modules
from vlp_jax.models.coca import CoCa, CoCaDecoder, CoCaText, check_coca

MODEL = "open_clip's CoCa"
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
IDS = ("bos_id", "eos_id", "pad_id")


def table_of(module: CoCa) -> Table:
    """Returns the mapping for a model."""
    ours, theirs = "pooler/attention", "visual.attn_pool.attn"
    weight, bias = fused(ours, f"{theirs}.in_proj_weight", f"{theirs}.in_proj_bias")
    # If the pooler's queries are as wide as the image's tokens, `torch.nn.MultiheadAttention` has
    # one matrix for queries, keys and values; if not, it has three, named by their first letter.
    # The bias is one tensor in both cases.
    weights = [weight]
    if module.embed_dim != module.image.width:
        weights = [
            Entry(f"{ours}/{name}/kernel", f"{theirs}.{name[0]}_proj_weight", HEADS_IN)
            for name in QKV
        ]
    decoder = "decoder/encoder"
    return [
        Entry("logit_scale", "logit_scale"),
        Entry("logit_bias", "logit_bias"),
        *NATIVE_TOWER,
        Entry("pooler/query", "visual.attn_pool.query"),
        *weights,
        bias,
        Entry("image_projection/kernel", "visual.proj"),
        Entry("text/token_embedding/embedding", "text.token_embedding.weight"),
        Entry("text/class_token", "text.cls_emb", SQUEEZED),
        Entry("text/position_embedding", "text.positional_embedding"),
        *layers("text/encoder/layers", "text.transformer.resblocks.{i}"),
        Entry("text_projection/kernel", "text.text_projection"),
        *layers(f"{decoder}/layers/read", "text_decoder.resblocks.{i}"),
        *layers(f"{decoder}/layers/look", "text_decoder.cross_attn.{i}"),
        *modules(
            {
                "pooler/norm_query": "visual.attn_pool.ln_q",
                "pooler/norm_tokens": "visual.attn_pool.ln_k",
                "pooler/attention/out": "visual.attn_pool.attn.out_proj",
                "pooler/norm": "visual.ln_post",
                "text/norm": "text.ln_final",
                f"{decoder}/layers/look/norm_context": "text_decoder.cross_attn.{i}.ln_1_kv",
                f"{decoder}/norm": "text_decoder.ln_final",
            }
        ),
        Entry("decoder/scores/kernel", "text_decoder.text_projection"),
    ]


def read(source: Source) -> Imported:
    """Makes the model that tensors and a config describe; without a config, `like` helps.

    Raises:
      UserError: the CoCa cannot be expressed here, or sizes do not fit each other.
    """
    _check_config(source)
    pixels, image = source.pixels(), source.native_image()
    queries, embed_dim = source.shape("visual.attn_pool.query", 2)
    if source.config:
        heads = {"attn_pooler_heads": POOLER_HEADS, **source.model["vision_cfg"]}
        pooler_heads = base.integer(heads, "attn_pooler_heads", source.where)
    else:
        pooler_heads = source.like.pooler_heads
    module = CoCa(
        image.clone(pooling="none", norm_after_pool=True),
        _text(source),
        _decoder(source),
        embed_dim,
        logit_scale_init=float(source.model.get("init_logit_scale", np.log(1 / 0.07))),
        logit_bias_init=-10.0 if "logit_bias" in source.tensors else None,
        queries=queries,
        pooler_heads=pooler_heads,
        pixels=pixels,
    )
    try:
        check_coca(module)
    except ValueError as error:
        raise UserError(f"{source.where}: {error}") from error
    return source.imported(module, table_of(module))


def _check_config(source: Source) -> None:
    """Raises UserError if the config describes no CoCa that can be expressed here."""
    where, model = source.where, source.model
    if not model:
        if not isinstance(source.like, CoCa):
            raise UserError(f"{source.weights} is a CoCa: it needs its {where.name} beside it")
        return
    if MULTIMODAL not in model:
        raise UserError(
            f"{where} has no {MULTIMODAL}, and the weights beside it are a CoCa's: put in the "
            f"section of the config that it was trained with"
        )
    if not isinstance(model[MULTIMODAL], dict):
        raise UserError(f"{where}: {MULTIMODAL} must be a mapping, not {model[MULTIMODAL]!r}")
    for section, key in NEEDED:
        if key not in model[section]:
            raise UserError(f"{where}: a model with {MULTIMODAL} needs {section}.{key} true")
    source.refuse_unless(HAS_KEYS)


def _text(source: Source) -> CoCaText:
    vocab_size, _ = source.shape("text.token_embedding.weight", 2)
    rows, _ = source.shape("text.positional_embedding", 2)
    if not source.config:
        told = source.told_by_like("text", *IDS)
    else:
        config, bos_id = source.model["text_cfg"], _bos_id(source.tokenizer)
        if bos_id is None:
            bos_id = vocab_size - 2  # its place in CLIP's vocabulary
            source.notes.append(
                f"nothing tells the token that captions begin with: {bos_id}, as in CLIP's"
            )
        told = {
            "bos_id": bos_id,
            "eos_id": config.get("eos_id", vocab_size - 1),
            "pad_id": config.get("pad_id", 0),
        }
    return base.tower(
        CoCaText,
        source.where,
        vocab_size=vocab_size,
        context_length=rows - 1,  # the last row of the table is the class token's
        **source.layers("text_cfg", "text.transformer.resblocks."),
        **told,
    )


def _decoder(source: Source) -> CoCaDecoder:
    _, vocab_size = source.shape("text_decoder.text_projection", 2)
    length = source.shape("text.positional_embedding", 2)[0] - 1
    if source.config:
        given = source.model[MULTIMODAL].get("context_length", 77)
        if given != length:
            raise UserError(
                f"{source.where}: {MULTIMODAL}.context_length {given!r} is not "
                f"text_cfg.context_length {length}, which is not supported"
            )
    return base.tower(
        CoCaDecoder,
        source.where,
        vocab_size=vocab_size,
        context_length=length,
        **source.layers(MULTIMODAL, "text_decoder.resblocks."),
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
    for name in IDS:
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
        MULTIMODAL: {
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

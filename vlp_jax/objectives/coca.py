"""CoCa: a contrastive and a captioning loss on one model (Yu et al. 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from vlp_jax import config as config_lib
from vlp_jax.models.attention import AttentionMask
from vlp_jax.models.coca import (
    CoCa,
    CoCaDecoder,
    CoCaText,
    check_coca,
    make_coca_decoder,
    make_coca_text,
)
from vlp_jax.models.values import ComputeConfig, Pixels, keywords_of
from vlp_jax.models.vit import VisionTransformer, make_vit
from vlp_jax.objectives.base import Part
from vlp_jax.objectives.captioning import Captioning
from vlp_jax.objectives.composite import Composite
from vlp_jax.objectives.compute import from_tokenizer, make_compute, with_attention
from vlp_jax.objectives.contrastive import Contrastive, check_loss
from vlp_jax.objectives.weight import StepsOf, Weight


def coca_parts(model: CoCa, *, contrast: Weight, caption: Weight, **settings: Any) -> Composite:
    """Makes the weighted sum of a model's contrastive and captioning losses.

    Args:
      contrast, caption: the weights of the two losses.
      settings: fields of `Contrastive`.
    """
    text = model.text
    says = Captioning(
        model, text.eos_id, text.pad_id, parallel_share=0.0, mean="token", bos_id=text.bos_id
    )
    pairs = Contrastive(model, "softmax", **settings)
    return Composite((Part("contrast", pairs, contrast), Part("caption", says, caption)))


@keywords_of(make_compute)
def make_coca(
    *,
    tokenizer: Any,
    steps_of: StepsOf | None = None,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    decoder: Mapping[str, Any],
    embed_dim: int,
    queries: int = 256,
    pooler_heads: int = 8,
    contrast_weight: float | Mapping[str, Any] = 1.0,
    caption_weight: float | Mapping[str, Any] = 2.0,
    loss_form: str = "plain",
    loss_block_size: int = 256,
    logit_scale_init: float = 1 / 0.07,
    max_logit_scale: float = 100.0,
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5),
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5),
    **compute: Any,
) -> Composite:
    """Makes the CoCa objective, a `Composite`, that `config.objective` describes.

    Args:
      tokenizer: gives the vocabulary and the context length; its rows begin with a bos.
      image: arguments of `make_vit`; by default with a class token, always without pooling.
      text: arguments of `make_coca_text`, and `attention` to differ from the other towers.
      decoder: arguments of `make_coca_decoder`.
      embed_dim, queries, pooler_heads: see `CoCa`.
      contrast_weight, caption_weight, steps_of: factors on the losses, see `Weight.of`.
      logit_scale_init: initial factor on the cosine similarity.
      loss_form, loss_block_size, max_logit_scale: see `Contrastive`.
      compute: see `make_compute`.

    Raises:
      ValueError: no tokenizer or one without bos, sizes that do not fit each other, or an attention
        backend that does not support the text tower's mask.
    """
    check_loss("softmax", loss_form, loss_block_size, logit_scale_init, max_logit_scale)
    where = "config.objective"
    model = CoCa(
        *_towers(tokenizer, make_compute(**compute), image, text, decoder, where),
        embed_dim,
        math.log(logit_scale_init),
        queries=queries,
        pooler_heads=pooler_heads,
        pixels=Pixels(tuple(image_mean), tuple(image_std)),
    )
    check_coca(model)
    return coca_parts(
        model,
        contrast=Weight.of(contrast_weight, steps_of, f"{where}.contrast_weight"),
        caption=Weight.of(caption_weight, steps_of, f"{where}.caption_weight"),
        max_logit_scale=max_logit_scale,
        loss_form=loss_form,
        loss_block_size=loss_block_size,
    )


def _towers(
    tokenizer: Any,
    how: ComputeConfig,
    image: Mapping[str, Any],
    text: Mapping[str, Any],
    decoder: Mapping[str, Any],
    where: str,
) -> tuple[VisionTransformer, CoCaText, CoCaDecoder]:
    ids = from_tokenizer(tokenizer, "coca", ("bos_id", "eos_id", "pad_id"))
    if tokenizer.bos_id is None:
        raise ValueError("coca needs a tokenizer with a bos, which each caption begins with")
    sizes = {name: ids[name] for name in ("vocab_size", "context_length")}
    # Only the kinds of rules are checked: those that the text tower's real mask has.
    mask = AttentionMask(causal=True, explicit=jnp.ones((1, 1, 1, 1), bool))
    text, reading = with_attention(text, how, mask)
    body = {"class_token": True, **image, "pooling": "none"}
    vit = config_lib.build(make_vit, body, f"{where}.image", compute=how)
    return (
        vit.clone(norm_after_pool=True),
        config_lib.build(make_coca_text, text, f"{where}.text", compute=reading, **ids),
        config_lib.build(make_coca_decoder, decoder, f"{where}.decoder", compute=how, **sizes),
    )

"""Arguments that all objectives share: how a model is computed, and what its tokenizer says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.models.attention import HOLDS, AttentionMask
from vlp_jax.models.values import ComputeConfig, check_choice

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_compute(
    *,
    dtype: str | None = None,
    attention: str = "xla",
    quantization: str = "none",
    remat: str = "none",
    scan_layers: bool = True,
) -> ComputeConfig:
    """Makes a `ComputeConfig` from names in a config; see there for the other fields.

    Args:
      dtype: "float32" or "bfloat16". None takes bfloat16 on accelerators and float32 on CPU.

    Raises:
      ValueError: an unknown dtype.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    check_choice("dtype", dtype, tuple(DTYPES))
    return ComputeConfig(DTYPES[dtype], attention, quantization, remat, scan_layers)


def from_tokenizer(
    tokenizer: Any, who: str, ids: tuple[str, ...] = ("eos_id", "pad_id")
) -> dict[str, int]:
    """Returns a text tower's sizes and ids; ValueError without a tokenizer, which `who` needs."""
    if tokenizer is None:
        raise ValueError(f"{who} needs config.tokenizer")
    return {name: getattr(tokenizer, name) for name in ("vocab_size", "context_length", *ids)}


def with_attention(
    section: Mapping[str, Any], how: ComputeConfig, mask: AttentionMask
) -> tuple[dict[str, Any], ComputeConfig]:
    """Takes `attention` out of a section, and puts it into `how`.

    Raises ValueError if the backend does not support the rules of `mask`: here, and not only when
    the step is traced.
    """
    section = dict(section.items())
    how = dataclasses.replace(how, attention=section.pop("attention", how.attention))
    mask.check(how.attention, HOLDS.get(how.attention, ()))
    return section, how

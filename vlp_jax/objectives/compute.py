"""How a model is computed, as the sections of several objectives say it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def compute_fields(
    dtype: str | None, scan_layers: bool, remat: str, attention: str, quantization: str
) -> dict[str, Any]:
    """The fields of towers that say how they are computed, not what.

    Args:
      dtype: of the computation; None: bfloat16 on accelerators and float32 on CPU.
      scan_layers: see `layers.Encoder`.
      remat: "none" or a name in `models.remat.REMAT_POLICIES`.
      attention: a name in `models.attention.ATTENTIONS`.
      quantization: "none" or "fp8", see `models.quantization`.

    Raises:
      ValueError: an unknown dtype.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r} (known: {', '.join(DTYPES)})")
    return {
        "scan_layers": scan_layers,
        "remat": remat,
        "attention": attention,
        "quantization": quantization,
        "dtype": DTYPES[dtype],
    }

"""How a model is computed, as the sections of several objectives say it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from vlp_jax.models.values import ComputeConfig
from vlp_jax.models.variants import check_choice

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def make_compute(
    *,
    dtype: str | None = None,
    attention: str = "xla",
    quantization: str = "none",
    remat: str = "none",
    scan_layers: bool = True,
) -> ComputeConfig:
    """The `ComputeConfig` of these names; fields as there.

    Args:
      dtype: "float32" or "bfloat16"; None: bfloat16 on accelerators and float32 on CPU.

    Raises:
      ValueError: an unknown dtype.
    """
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    check_choice("dtype", dtype, tuple(DTYPES))
    return ComputeConfig(DTYPES[dtype], attention, quantization, remat, scan_layers)

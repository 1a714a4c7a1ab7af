"""The keys of `config.objective` that choose how a model is computed, for all objectives."""

from __future__ import annotations

import jax
import jax.numpy as jnp

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

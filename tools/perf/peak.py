"""The rate at which the devices of this process multiply matrices."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from vlp_jax.observe.accelerators import table_flops

# A product takes under 0.2 s, and more than the time that it takes to start it by far.
_SIZES = {"cpu": (2048,), "other": (8192, 16384)}
_REPEATS, _IN_A_ROW = 5, 4


@dataclasses.dataclass(frozen=True)
class Peak:
    """FLOP/s of all devices together, a multiply-add counting 2.

    Attributes:
      measured: the best rate of a large matrix product in this process.
      data_sheet: of the table of accelerators; None if it has no such device.
      dtype: of the product.
      size: rows and columns of the best one.
    """

    measured: float
    data_sheet: float | None
    dtype: str
    size: int


def measure_peak(devices: Sequence[jax.Device], compute_dtype: Any) -> Peak:
    """Measures `devices`: in bfloat16 on accelerators, in the dtype of the computation on CPU.

    CPU devices of one process share its cores: there one of them, which has all threads, and all
    of them at once are tried.
    """
    on_cpu = devices[0].platform == "cpu"
    dtype = jnp.dtype(compute_dtype if on_cpu else jnp.bfloat16)
    # XLA gives each CPU device a pool: one device with all threads may win, or two side by side.
    groups = [devices[:1], devices] if on_cpu and len(devices) > 1 else [devices]
    sizes = _SIZES["cpu" if on_cpu else "other"]
    rate, size = max((_rate(group, n, dtype), n) for group in groups for n in sizes)
    try:
        sheet = table_flops(devices[0].device_kind, dtype) * len(devices)
    except KeyError:
        sheet = None
    return Peak(rate, sheet, dtype.name, size)


def _rate(devices: Sequence[jax.Device], n: int, dtype: Any) -> float:
    """Returns FLOP/s of n x n products, one on each of `devices` at a time."""
    host = jax.random.normal(jax.random.key(0), (n, n), jnp.float32).astype(dtype)
    matrices = [jax.device_put(host, device) for device in devices]
    product = jax.jit(jnp.matmul)
    # Compiles, and lets clocks rise, outside of the timed products.
    jax.block_until_ready([product(x, x) for x in matrices])
    best = float("inf")
    for _ in range(_REPEATS):
        begin = time.perf_counter()
        jax.block_until_ready([product(x, x) for _ in range(_IN_A_ROW) for x in matrices])
        # The best and not the median: a peak is what the machine can do.
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 * _IN_A_ROW * len(devices) / best

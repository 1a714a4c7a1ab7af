"""Figures of devices: the peak rate of matrix products, and memory in use."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

_DTYPES = ("bfloat16", "float16", "float32")
_MEASURE_BUDGET_SECONDS = 0.25  # a start should not wait longer for a figure of one line


@dataclasses.dataclass(frozen=True)
class PeakFlops:
    """Dense FLOP/s of one JAX device, from the table of data sheets or measured here."""

    flops: float
    source: Literal["table", "measured"]


# Patterns are searched in `device.device_kind`, first match wins. A JAX device of TPU v2, v3 and
# 7x is one of the chip's two TensorCores, so these have half of the chip's figure.
# A row is a pattern, then dense TFLOP/s (no structured sparsity, at the boost clock) of bfloat16,
# of float32 at JAX's default precision (TF32 on NVIDIA from Ampere on, one bfloat16 pass on TPU),
# and of float16 where it differs from bfloat16.
_PEAK_TFLOPS = (
    # https://docs.cloud.google.com/tpu/docs/v2: 46 a chip
    (r"^TPU v2$", 23.0, 23.0),
    # https://docs.cloud.google.com/tpu/docs/v3: 123 a chip
    (r"^TPU v3$", 61.5, 61.5),
    # https://docs.cloud.google.com/tpu/docs/v4: 275 a chip
    (r"^TPU v4$", 275.0, 275.0),
    # https://docs.cloud.google.com/tpu/docs/v5e: 197 a chip
    (r"^TPU v5 ?(lite|e)$", 197.0, 197.0),
    # https://docs.cloud.google.com/tpu/docs/v5p: 459 a chip
    (r"^TPU v5p?$", 459.0, 459.0),
    # https://docs.cloud.google.com/tpu/docs/v6e: 918 a chip
    (r"^TPU v6 ?(lite|e)$", 918.0, 918.0),
    # https://docs.cloud.google.com/tpu/docs/tpu7x: 2307 a chip
    (r"^TPU ?v?7x$", 1153.5, 1153.5),
    # NVIDIA GB200 NVL72 data sheet: 5000 bf16, 2500 tf32 with sparsity
    (r"\bGB200\b", 2500.0, 1250.0),
    # NVIDIA HGX B200 data sheet: 4500 bf16, 2250 tf32 with sparsity, a GPU
    (r"\bB200\b", 2250.0, 1125.0),
    # NVIDIA H200 data sheet: NVL 1671 bf16, 836 tf32; SXM 1979, 989; all with sparsity
    (r"\bH200 NVL\b", 835.5, 418.0),
    (r"\bH200\b", 989.5, 494.5),
    # NVIDIA H100 data sheet: NVL 1671 bf16, 835 tf32; PCIe 1513, 756; SXM 1979, 989; with sparsity
    (r"\bH100 NVL\b", 835.5, 417.5),
    (r"\bH100 PCIe\b", 756.5, 378.0),
    (r"\bH100\b", 989.5, 494.5),
    # NVIDIA GH200 data sheet: the Hopper of H100 SXM
    (r"\bGH200\b", 989.5, 494.5),
    # NVIDIA A100 data sheet (SXM and PCIe alike)
    (r"\bA100\b", 312.0, 156.0),
    # NVIDIA A40, A30, A10 data sheets
    (r"\bA40\b", 149.7, 74.8),
    (r"\bA30\b", 165.0, 82.0),
    (r"\bA10\b", 125.0, 62.5),
    # AWS G5: A10G, 70 bf16 and 35 tf32 (its tensor cores run at half of A10's rate)
    (r"\bA10G\b", 70.0, 35.0),
    # NVIDIA L40S data sheet (362 bf16, 183 tf32); L4 data sheet (242 and 120 with sparsity)
    (r"\bL40S\b", 362.0, 183.0),
    (r"\bL4\b", 121.0, 60.0),
    # NVIDIA T4 and V100 data sheets. No bfloat16 and no TF32 before Ampere: both run as float32
    (r"\bT4\b", 8.1, 8.1, 65.0),
    (r"\bV100-PCIE\b", 14.0, 14.0, 112.0),
    (r"\bV100\b", 15.7, 15.7, 125.0),
    # NVIDIA Ada and GA102 architecture white papers, float32 accumulation
    (r"\bRTX 4090$", 165.2, 82.6),
    (r"\bRTX 3090$", 71.0, 35.6),
)


def peak_flops(device: jax.Device, dtype: Any) -> PeakFlops:
    """Returns the peak rate of matrix products of one device (a multiply-add is two FLOPs).

    Known accelerators come from the table of data-sheet figures. Anything else (a CPU, a new chip,
    a MIG slice) is measured here, which takes about 0.3 s on a laptop. CPU devices of one process
    share the host's cores, so each gets its share of the host's figure.

    Raises:
        ValueError: `dtype` is not bfloat16, float16 or float32.
    """
    name = jnp.dtype(dtype).name
    if name not in _DTYPES:
        raise ValueError(f"peak_flops knows {', '.join(_DTYPES)}, not {name}")
    tflops = _table_tflops(device.device_kind, name)
    if tflops is not None:
        return PeakFlops(tflops * 1e12, "table")
    return PeakFlops(_measured_flops(device, dtype), "measured")


def table_flops(device_kind: str, dtype: Any) -> float:
    """Returns the peak of an accelerator that need not be here, in FLOP/s; KeyError if unknown."""
    tflops = _table_tflops(device_kind, jnp.dtype(dtype).name)
    if tflops is None:
        raise KeyError(f"no peak is known of {device_kind!r}")
    return tflops * 1e12


def _table_tflops(device_kind: str, dtype: str) -> float | None:
    if "MIG" in device_kind:  # a slice of the GPU whose name it bears
        return None
    for pattern, bfloat16, float32, *float16 in _PEAK_TFLOPS:
        if re.search(pattern, device_kind):
            half = (*float16, bfloat16)[0]
            return {"bfloat16": bfloat16, "float16": half, "float32": float32}[dtype]
    return None


def _measured_flops(device: jax.Device, dtype: Any) -> float:
    """Measures the best rate of a few n x n products, in FLOP/s."""
    started = time.perf_counter()
    on_cpu = device.platform == "cpu"
    n = 1024 if on_cpu else 8192  # large enough to fill the device, short enough to wait for
    matrix = jax.device_put(jnp.ones((n, n), dtype), device)
    product = jax.jit(jnp.matmul).lower(matrix, matrix).compile()
    product(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(8):
        before = time.perf_counter()
        product(matrix, matrix).block_until_ready()
        after = time.perf_counter()
        best = min(best, after - before)
        if after - started > _MEASURE_BUDGET_SECONDS - best:
            break
    # CPU devices share the cores, and a product on one of them takes all cores.
    share = len(jax.local_devices(backend="cpu")) if on_cpu else 1
    return 2 * n**3 / best / share


# Ours -> the key of `Device.memory_stats()`, in bytes.
_DEVICE_KEYS = {
    "memory/bytes_in_use": "bytes_in_use",
    "memory/peak_bytes_in_use": "peak_bytes_in_use",
    "memory/limit": "bytes_limit",
}
HOST = "memory/host_rss_bytes"


def memory_metrics(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """Measures the bytes in use of the fullest device and of the host: now, at most, and at hand.

    Returns:
        memory/bytes_in_use, memory/peak_bytes_in_use (since the process started) and memory/limit,
        each the largest of any device, where devices tell (a CPU does not). On Linux also
        memory/host_rss_bytes, the resident memory.
    """
    metrics: dict[str, float] = {}
    for device in jax.local_devices() if devices is None else devices:
        stats = device.memory_stats() or {}
        for name, key in _DEVICE_KEYS.items():
            if key in stats:
                metrics[name] = max(metrics.get(name, 0.0), float(stats[key]))
    resident = host_rss_bytes()
    return metrics if resident is None else {**metrics, HOST: float(resident)}


def largest(of_processes: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Returns the largest value of each metric over the processes that have it."""
    found: dict[str, float] = {}
    for metrics in of_processes:
        for name, value in metrics.items():
            found[name] = max(found.get(name, value), value)
    return found


def host_rss_bytes(statm: str = "/proc/self/statm") -> int | None:
    """Reads the resident memory of this process (man 5 proc, statm); None if not on Linux."""
    try:
        with open(statm) as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError, ValueError):
        return None

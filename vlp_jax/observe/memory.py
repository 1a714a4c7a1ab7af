"""Memory in use on the devices, where they tell, and of this process on the host."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

import jax

# Ours -> the key of `Device.memory_stats()`, in bytes.
_DEVICE_KEYS = {
    "memory/bytes_in_use": "bytes_in_use",
    "memory/peak_bytes_in_use": "peak_bytes_in_use",
    "memory/limit": "bytes_limit",
}
HOST = "memory/host_rss_bytes"


def memory_metrics(devices: Sequence[jax.Device] | None = None) -> dict[str, float]:
    """Measures the bytes in use of the fullest device and of the host: now, at most, and at hand.

    Args:
        devices: None for the devices of this process.

    Returns:
        memory/bytes_in_use, memory/peak_bytes_in_use and memory/limit, each the largest of any
        device. Figures that no device tells are left out (a CPU tells none). The peak counts from
        the start of the process. On Linux also memory/host_rss_bytes, the resident memory.
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

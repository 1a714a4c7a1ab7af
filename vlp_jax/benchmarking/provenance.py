"""Where figures are from: command, date, versions, commit, machine."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Sequence
from typing import Any

import jax

from vlp_jax.versions import commit, versions

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "numpy",
    "torch",
    "timm",
    "transformers",
    "open_clip_torch",
)


def provenance(module: str, argv: Sequence[str]) -> dict[str, Any]:
    """What has to be known to measure the same again.

    Args:
      module: that was started, as in `python -m MODULE`.
      argv: its arguments.
    """
    device = jax.local_devices()[0]
    return {
        "command": shlex.join(["python", "-m", module, *argv]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(PACKAGES),
        "device_kind": device.device_kind,
        "device_platform": device.platform,
        "host_devices": jax.local_device_count(),
        "host_cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "machine": platform.machine(),
        "load_average": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "environment": {
            name: os.environ[name]
            for name in (
                "XLA_FLAGS",
                "XLA_PYTHON_CLIENT_PREALLOCATE",
                "PJRT_NPROC",
                "GLIBC_TUNABLES",
            )
            if name in os.environ
        },
    }

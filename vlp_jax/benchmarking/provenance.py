"""Where figures are from: command, date, versions, commit, machine."""

from __future__ import annotations

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

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
        "versions": versions(),
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
            for name in ("XLA_FLAGS", "XLA_PYTHON_CLIENT_PREALLOCATE", "PJRT_NPROC")
            if name in os.environ
        },
    }


def versions() -> dict[str, str]:
    """Of the packages that figures depend on, as far as they are installed, and of Python."""
    found = {"python": sys.version.split()[0]}
    for package in PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found


def commit() -> str | None:
    """Of the checkout that this file is in, with "-dirty" if files were changed; None without."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None

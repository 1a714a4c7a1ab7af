"""Versions, devices, commit, command and time, for the footer of a page."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from vlp_jax.versions import commit, versions

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow", "tensorflow-cpu")


def provenance(command: Sequence[str]) -> Mapping[str, str]:
    """Returns label -> text; facts that cannot be found out are left out.

    Args:
      command: the command line after `python -m vlp_jax.evaluate`.
    """
    now = datetime.datetime.now(datetime.UTC)
    found = {
        "made": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "vlp_jax.evaluate", *command]),
        "commit": commit(),
        "devices": _devices(),
        "processor": _processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {which}" for name, which in versions(PACKAGES).items()),
    }
    return {name: text for name, text in found.items() if text}


def _devices() -> str:
    kinds = sorted({device.device_kind for device in jax.devices()})
    processes = jax.process_count()
    more = f" on {processes} processes" if processes > 1 else ""
    return f"{jax.device_count()} \N{MULTIPLICATION SIGN} {', '.join(kinds)}{more}"


def _processor() -> str:
    # Under Linux `platform.processor` is empty.
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((ln.split(":", 1)[1].strip() for ln in lines if "model name" in ln), model)
    except OSError:
        pass  # elsewhere than on Linux
    return f"{model}, {os.cpu_count()} cores" if model else ""

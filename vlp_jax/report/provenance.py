"""By what a page was made: versions, devices, commit, command, time."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "tensorflow", "tensorflow-cpu")


def provenance(command: Sequence[str]) -> Mapping[str, str]:
    """What it is -> its text; what cannot be found out is left out.

    Args:
      command: the arguments after `python -m vlp_jax.evaluate`.
    """
    now = datetime.datetime.now(datetime.UTC)
    found = {
        "made": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["python", "-m", "vlp_jax.evaluate", *command]),
        "commit": commit(),
        "devices": _devices(),
        "processor": _processor(),
        "Python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "packages": ", ".join(_versions()),
    }
    return {name: text for name, text in found.items() if text}


def commit() -> str:
    """The commit of the code that runs, and whether files differ from it; "" if git has it not."""
    root = Path(__file__).resolve().parent.parent
    try:
        _, head, changes = (
            subprocess.run(
                ["git", "-C", str(root), *arguments],
                capture_output=True,
                text=True,
                check=True,
                timeout=20,
            ).stdout.strip()
            for arguments in (
                # Installed into a folder of somebody else's repository, it is not of its commit.
                ["ls-files", "--error-unmatch", __file__],
                ["rev-parse", "HEAD"],
                ["status", "--porcelain", "--", str(root)],
            )
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return f"{head[:12]}{' with changes' if changes else ''}"


def _devices() -> str:
    kinds = sorted({device.device_kind for device in jax.devices()})
    processes = jax.process_count()
    more = f" on {processes} processes" if processes > 1 else ""
    return f"{jax.device_count()} \N{MULTIPLICATION SIGN} {', '.join(kinds)}{more}"


def _processor() -> str:
    model = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((ln.split(":", 1)[1].strip() for ln in lines if "model name" in ln), model)
    except OSError:
        pass  # elsewhere than on Linux
    return f"{model}, {os.cpu_count()} cores" if model else ""


def _versions() -> list[str]:
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return found

"""Versions of installed packages, and the commit of this code, for records of runs."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

UNKNOWN = "unknown"
DIGITS = 12  # of a commit's hash


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Returns the versions of Python, this package, and each of `packages` that is installed."""
    installed = {"python": platform.python_version(), "vlp_jax": version()}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def version() -> str:
    """Returns the version of this package; "unknown" if it runs from a folder, not installed."""
    try:
        return importlib.metadata.version("vlp_jax")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def commit() -> str | None:
    """Returns the commit that this code runs from, with "+changes"; None without git."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An environment inside another project's checkout: that project's commit means nothing here.
    if git("ls-files", "--error-unmatch", str(file)) is None:
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return head and f"{head[:DIGITS]}{'+changes' if changes else ''}"

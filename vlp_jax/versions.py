"""What runs: the versions of packages, and the commit of this one."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path

UNKNOWN = "unknown"
DIGITS = 12  # of a commit


def versions(packages: Sequence[str]) -> dict[str, str]:
    """Of Python, of this package, and of those of `packages` that are installed."""
    found = {"python": platform.python_version(), "vlp_jax": version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def version() -> str:
    """Of this package; "unknown" where it runs from a folder and is not installed."""
    try:
        return importlib.metadata.version("vlp_jax")
    except importlib.metadata.PackageNotFoundError:
        return UNKNOWN


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+changes" if files differ from it;
    None outside of a checkout or without git."""
    file = Path(__file__).resolve()

    def git(*arguments: str) -> str | None:
        command = ["git", "-C", str(file.parent), *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Of a package in some other project's environment that project's commit says nothing.
    if git("ls-files", "--error-unmatch", str(file)) is None:
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return head and f"{head[:DIGITS]}{'+changes' if changes else ''}"

"""export.json: what an export is, of what, how it was proved, and the digests of its files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

import vlp_jax
from vlp_jax.interop import files
from vlp_jax.interop.staging import RECORD

LIBRARIES = ("jax", "flax", "numpy", "safetensors", "orbax-checkpoint")
BLOCK = 1 << 20  # bytes that are hashed at a time


def versions() -> dict[str, str]:
    """Of Python, this package and the libraries that have a part in an export."""
    found = {"python": platform.python_version(), "vlp_jax": version()}
    for name in LIBRARIES:
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
        return "unknown"


def commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+changes" if files differ from it;
    None outside of a checkout or without git."""
    root = Path(vlp_jax.__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(
                ["git", "-C", root, *arguments], capture_output=True, text=True, timeout=30
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # Of a package in some other project's environment that project's commit says nothing.
    if git("ls-files", "--error-unmatch", "vlp_jax/__init__.py") is None:
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changes else head


def write(directory: Path, said: dict[str, Any]) -> Path:
    """Writes export.json into a folder that has all its other files.

    Args:
      said: what it begins with.
    """
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    listed = {
        path.relative_to(directory).as_posix(): {
            "bytes": path.stat().st_size,
            "sha256": digest(path),
        }
        for path in paths
        if path.name != RECORD
    }
    return files.save_json({**said, "files": listed}, directory / RECORD)


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()

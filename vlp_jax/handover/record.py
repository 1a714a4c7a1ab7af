"""Writes export.json: the facts about an export, and the digests of its files."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from vlp_jax.interop import files
from vlp_jax.interop.staging import RECORD

LIBRARIES = ("jax", "flax", "numpy", "safetensors", "orbax-checkpoint")
BLOCK = 1 << 20  # bytes that are hashed at a time


def write(directory: Path, facts: dict[str, Any]) -> Path:
    """Writes export.json into a folder that has all other files.

    Args:
      facts: the first keys of the file; the list of files follows.
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
    return files.save_json({**facts, "files": listed}, directory / RECORD)


def digest(path: Path) -> str:
    """Computes the SHA-256 of a file, in hexadecimal."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            state.update(block)
    return state.hexdigest()

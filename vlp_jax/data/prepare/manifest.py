"""The manifest of a split: its shards, their source, fields and checksums."""

from __future__ import annotations

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from vlp_jax.data.prepare import paths, shards
from vlp_jax.errors import UserError

VERSION = 1
_IDENTITY = ("format", "split", "seed", "source")
_READERS = 8  # shards whose checksums are computed at once

Manifest = dict[str, Any]


def manifest_path(output: str, split: str) -> str:
    """The path of the manifest of a split."""
    return paths.join(output, f"{split}.manifest.json")


def load(output: str, split: str) -> Manifest | None:
    """The manifest of a split, or None if there is none.

    Raises:
      UserError: if it is no JSON, or of another version.
    """
    path = manifest_path(output, split)
    try:
        manifest = json.loads(paths.read_bytes(path))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is malformed: {error.msg}; remove it") from None
    if manifest.get("version") != VERSION:
        raise UserError(f"{path} has version {manifest.get('version')}, not {VERSION}")
    return manifest


def identity(manifest: Manifest) -> dict[str, Any]:
    """The part of a manifest that is known before anything is written, and decides the rest."""
    return {key: manifest[key] for key in _IDENTITY}


def check_same(old: dict[str, Any], new: dict[str, Any], folder: str) -> None:
    """Checks that a folder was begun with the same input and settings.

    Raises:
      UserError: naming what differs first, with both values.
    """
    found = _difference(old, json.loads(json.dumps(new)), "")
    if found is not None:
        name, before, now = found
        raise UserError(
            f"{folder} holds another job: {name} was {before} and is now {now}; give another "
            f"--output or --split, or remove {new['split']}* there"
        )


def _difference(old: Any, new: Any, name: str) -> tuple[str, str, str] | None:
    if old == new:
        return None
    if isinstance(old, dict) and isinstance(new, dict):
        # Settings before files: a changed setting says more than thousands of changed paths.
        for key in sorted({*old, *new}, key=lambda key: (key == "files", key)):
            part = f"{name}.{key}" if name else key
            found = _difference(old.get(key), new.get(key), part)
            if found is not None:
                return found
    if isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            return name, f"{len(old)} long", f"{len(new)} long"
        pairs = enumerate(zip(old, new, strict=True))
        index, (before, now) = next((i, pair) for i, pair in pairs if pair[0] != pair[1])
        return f"{name}[{index}]", json.dumps(before), json.dumps(now)
    return name, json.dumps(old), json.dumps(new)


def faults(manifest: Manifest, output: str, read: bool) -> dict[str, str]:
    """Maps file name to fault for the damaged shards of a manifest.

    Args:
      read: whether to read every shard and compare checksums; else sizes are compared.
    """
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda record: shards.fault_of(record, output, read), manifest["shards"])
        names = [record["file"] for record in manifest["shards"]]
        return {name: fault for name, fault in zip(names, found, strict=True) if fault}


def write(
    identity: dict[str, Any],
    output: str,
    fields: shards.FieldTypes,
    skipped: dict[str, int],
    records: Sequence[dict[str, Any]],
) -> Manifest:
    """Writes the manifest of finished shards, whole or not at all, and returns it."""
    manifest = {
        "version": VERSION,
        "format": identity["format"],
        "split": identity["split"],
        "examples": sum(record["examples"] for record in records),
        "seed": identity["seed"],
        "fields": fields,
        "source": identity["source"],
        "skipped": skipped,
        "shards": [
            {key: record[key] for key in ("file", "examples", "bytes", "sha256")}
            for record in records
        ],
    }
    content = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
    paths.write_bytes(manifest_path(output, identity["split"]), content.encode())
    return manifest

"""The manifest of prepared data: its files, how many examples each holds, and their features."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vlp_jax.data import files
from vlp_jax.data.sources.labels import WordClasses
from vlp_jax.data.sources.shards import Piece
from vlp_jax.errors import UserError

SUFFIX = ".json"


@dataclass(frozen=True)
class Manifest:
    """The files of prepared data, in the format "array_record", "tfrecord" or "webdataset".

    Attributes:
      features: name -> "bytes", "int64" or "float32", with "[]" behind it for a list.
      class_names: field -> names of its classes, if its labels are words.
    """

    format: str
    pieces: tuple[Piece, ...]
    features: Mapping[str, str]
    class_names: Mapping[str, WordClasses]


def find_pieces(
    path: str | Sequence[str], suffix: str | tuple[str, ...], kind: str
) -> tuple[list[Piece], Manifest | None]:
    """Finds the files that a config's `path` names, with their counts if a manifest says them.

    Args:
      path: as `files.expand` takes it with `suffix`, or a manifest of files of the format `kind`.

    Raises:
      UserError: for files that are not there, or a manifest that cannot be used.
    """
    if isinstance(path, str) and path.endswith(SUFFIX):
        manifest = read_manifest(path)
        if manifest.format != kind:
            raise UserError(
                f"data.path={path!r} is the manifest of {manifest.format} files: set data.source "
                f"to {manifest.format!r}"
            )
        return list(manifest.pieces), manifest
    return [Piece(file) for file in files.expand(path, suffix)], None


def read_manifest(path: str) -> Manifest:
    """Reads a manifest; raises UserError if it is not there, or none."""

    try:
        content = json.loads(files.read(path))
        folder = path.rpartition("/")[0]
        pieces = [
            Piece(f"{folder}/{shard['file']}" if folder else shard["file"], 0, shard["examples"])
            for shard in content["shards"]
        ]
        features = {
            name: field["dtype"] + ("[]" if field["list"] else "")
            for name, field in content["fields"].items()
        }
        named = content.get("source", {}).get("class_names", {})
        classes = {name: WordClasses(names) for name, names in named.items()}
        return Manifest(content["format"], tuple(pieces), features, classes)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not a manifest of prepared data: {error!r}") from None

"""Files of tokenizers: their kind by their content, and the note in the file of a run.

A run keeps its tokenizer in one file, whatever its kind: a tokenizer.json of the Hugging Face
library for "subword", and for the others a JSON mapping whose "type" is the name of the kind.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from typing import Any

from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import without_mark, write_whole

# The kinds that a file can be of, and what such a file is called in messages.
KINDS = {
    "bytes": "the note of a bytes tokenizer",
    "subword": "a tokenizer.json of the Hugging Face `tokenizers` library",
    "clip": "a file of CLIP's merges",
    "sentencepiece": "a SentencePiece model",
}


def write_note(path: str | os.PathLike[str], kind: str, **content: Any) -> None:
    """Writes the file in which a run keeps a tokenizer of `kind`, whole or not at all."""
    write_whole(path, json.dumps({"type": kind, **content}) + "\n")


def read_note(content: bytes, kind: str) -> dict[str, Any] | None:
    """Reads what `write_note` wrote; None if the content is no such file of `kind`."""
    mapping = _as_mapping(content)
    return mapping if mapping is not None and mapping.get("type") == kind else None


def read(path: str | os.PathLike[str], kind: str) -> bytes:
    """The content of a file of the kind `kind` (or an error), unpacked if it is gzipped."""
    path = epath.Path(path)
    if not path.is_file():
        raise UserError(f"tokenizer file {path} does not exist")
    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} is a gzip file that cannot be unpacked: {error}") from None
    content = without_mark(content, str(path))  # a model of SentencePiece never begins so
    found = kind_of(content)
    if found not in (None, kind):
        raise UserError(
            f"{path} is {KINDS[found]}, not {KINDS[kind]}: set config.tokenizer.name to {found!r} "
            f"to use it"
        )
    return content


def kind_of(content: bytes) -> str | None:
    """The key of `KINDS` that the content of a file is of; None if it looks like none of them."""
    mapping = _as_mapping(content)
    if mapping is not None:
        if mapping.get("type") in KINDS:
            return mapping["type"]
        return "subword" if "model" in mapping else None
    # A ModelProto begins with its first piece (field 1), which begins with its string (field 1).
    if content[:1] == b"\n" and content[2:3] == b"\n":
        return "sentencepiece"
    # Merges are two words a line, behind a header.
    lines = content[:4096].decode("utf-8", "replace").splitlines()[:4]
    pairs = [len(line.split()) == 2 for line in lines[1:]]
    return "clip" if pairs and all(pairs) else None


def _as_mapping(content: bytes) -> dict[str, Any] | None:
    """The JSON mapping in a file, None if there is none."""
    if content.lstrip()[:1] != b"{":
        return None
    try:
        value = json.loads(content)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None

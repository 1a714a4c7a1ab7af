"""Examples between input and shard, and the types of their fields."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlp_jax.data.faults import (
    EMPTY_TEXT,
    MALFORMED_TEXT,
    MISSING_FIELD,
    UNDECODABLE,
    UNREADABLE,
    BadExample,
)
from vlp_jax.data.image_ops.upright import DECODABLE, format_of, pillow_errors, unknown_format
from vlp_jax.errors import UserError

ID, IMAGE, CAPTIONS = "id", "image", "captions"
INTEGER, FLOAT, TEXT, BINARY, LIST = "integer", "float", "text", "binary", "list"
# UTF-16 without a byte order mark is valid UTF-8 for Latin letters: each second byte is 0.
UTF16 = re.compile("[^\0]\0[^\0]\0|\0[^\0]\0[^\0]")
Value = int | float | str | bytes | list[Any]


@dataclass(frozen=True, slots=True)
class SkippedExample:
    """An example that cannot be used: why (one of `faults.REASONS`), and where it lies.

    `ends_file` says that the rest of the file is lost too.
    """

    reason: str
    where: str
    detail: str
    ends_file: bool = False


@dataclass(frozen=True, slots=True)
class Reference:
    """An example without its image, which is `size` bytes at `offset` of the file `path`.

    Its id is unique in the input, and the same whatever else is read. Of the captions there is at
    least one, and none is empty. `path` is None if the image cannot be read again.
    """

    id: str
    path: str | None
    offset: int
    size: int
    captions: list[str]
    fields: dict[str, Value]

    def dumps(self) -> str:
        """One line of JSON; `loads` is the inverse."""
        parts = [self.id, self.path, self.offset, self.size, self.captions, self.fields]
        return json.dumps(parts, default=_encode_bytes, ensure_ascii=False)

    @staticmethod
    def loads(line: str) -> Reference:
        return Reference(*json.loads(line, object_hook=_decode_bytes))


@dataclass(frozen=True, slots=True)
class Candidate:
    """An example of an input, whose image is not yet looked at; `where` is for messages."""

    reference: Reference
    where: str
    image: bytes


def _encode_bytes(value: Any) -> dict[str, str]:
    if isinstance(value, bytes):
        return {"base64:": base64.b64encode(value).decode()}
    raise TypeError(f"{type(value).__name__} is no value of a field")


def _decode_bytes(value: dict[str, Any]) -> Any:
    return base64.b64decode(value["base64:"]) if list(value) == ["base64:"] else value


def place(seed: int, id: str) -> str:
    """The key by which examples are sorted globally: 32 hexadecimal digits, compared as text.

    They begin SHA-256 of "seed:id": an example keeps its place whatever the order of the input.
    """
    return hashlib.sha256(f"{seed}:{id}".encode()).hexdigest()[:32]


def clean_captions(value: Any) -> list[str]:
    """Lists the captions in a string, number, UTF-8 bytes or list; BadExample if all are empty."""
    if value is None:
        raise BadExample(MISSING_FIELD, "no caption")
    captions = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, bytes):
            item = decode_text(item, "caption")
        elif isinstance(item, int | float) and not isinstance(item, bool):
            item = str(item)
        if item is not None and not isinstance(item, str):
            raise BadExample(UNREADABLE, f"a caption is a {type(item).__name__}, not a string")
        # JSON can spell half of a surrogate pair, which no encoder takes.
        text = (item or "").strip().encode("utf-8", "replace").decode()
        captions.extend([text] if text else [])
    if not captions:
        raise BadExample(EMPTY_TEXT, "all captions are empty")
    return captions


def clean_value(name: str, value: Any) -> Value:
    """Converts a value to what a shard can hold: int, float, str, bytes, or a list of one type."""
    if isinstance(value, list | tuple):
        items = [clean_value(name, item) for item in value]
        if any(isinstance(item, list) for item in items):
            raise BadExample(UNREADABLE, f"{name!r} is a list of lists")
        return items
    if value is None:
        raise BadExample(MISSING_FIELD, f"{name!r} is null")
    if isinstance(value, bool):  # before int, of which bool is a subclass
        return int(value)
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        raise BadExample(UNREADABLE, f"{name!r} is {value}, which is no int64")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if not isinstance(value, int | float | bytes):
        raise BadExample(UNREADABLE, f"{name!r} is a {type(value).__name__}")
    return value


def decode_text(data: bytes, name: str) -> str:
    """Decodes UTF-8 text, with or without a byte order mark; `name` is for the message."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise BadExample(MALFORMED_TEXT, f"{name} is not UTF-8") from None
    if UTF16.match(text):
        raise BadExample(MALFORMED_TEXT, f"{name} is UTF-16, not UTF-8")
    return text


def kinds_of(value: Value) -> set[str]:
    """The types that occur in a value: `LIST` and the type of its items, or its own type."""
    if isinstance(value, list):
        return {LIST}.union(*(kinds_of(item) for item in value))
    kinds = {int: INTEGER, float: FLOAT, str: TEXT, bytes: BINARY}
    return {kinds[type(value)]}


def field_types(
    kinds: Mapping[str, Iterable[str]], names: Iterable[str], text_only: bool
) -> dict[str, dict[str, Any]]:
    """The manifest's `fields`: name -> {"dtype": "bytes", "int64" or "float32", "list": bool}.

    Args:
      kinds: by name of a further field, `kinds_of` of all its values together.
      text_only: whether the format holds bytes only as UTF-8 text.

    Raises UserError for a field that has numbers here and strings there, or does not fit the
    format.
    """
    types = {
        ID: {"dtype": "bytes", "list": False},
        IMAGE: {"dtype": "bytes", "list": False},
        CAPTIONS: {"dtype": "bytes", "list": True},
    }
    for name in names:
        found = set(kinds.get(name, ()))
        scalars = found - {LIST}
        if scalars & {TEXT, BINARY} and scalars & {INTEGER, FLOAT}:
            raise UserError(
                f"field {name!r} is a number in some examples and a string in others: leave it out"
            )
        if BINARY in scalars and text_only:
            raise UserError(
                f"field {name!r} holds bytes, which webdataset's JSON cannot: choose array_record "
                "or tfrecord, or leave it out"
            )
        dtype = "bytes"
        if scalars and scalars <= {INTEGER, FLOAT}:
            dtype = "int64" if scalars == {INTEGER} else "float32"
        types[name] = {"dtype": dtype, "list": LIST in found}
    return types


# The usual file name extension of each format that training decodes.
_EXTENSIONS = {name: {"JPEG": "jpg"}.get(name, name.lower()) for name in DECODABLE}


def image_type(image: bytes) -> str | None:
    """The usual file name extension of an image's format; None for a format that is not known."""
    return _EXTENSIONS.get(format_of(image))


def image_fault(image: bytes, decode: bool) -> tuple[str, str] | None:
    """Why an encoded image cannot be used: (one of `faults.REASONS`, detail), or None.

    All pixels are decoded if `decode`; else only the header is read.
    """
    kind = format_of(image)
    if kind not in DECODABLE:
        return UNDECODABLE, unknown_format(image)
    try:
        with pillow_errors(kind), Image.open(io.BytesIO(image), formats=[kind.upper()]) as opened:
            # Opening reads the header alone; of WebP it decodes the first frame.
            if decode:
                opened.load()
    except BadExample as bad:
        return bad.reason, bad.detail
    return None

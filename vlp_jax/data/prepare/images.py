"""Telling an encoded image's type by its content, and looking whether it can be decoded."""

from __future__ import annotations

import io
from collections.abc import Callable

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE
from vlp_jax.data.image_ops.headers import DECODABLE, format_of, unknown_format

HEAD_BYTES = 4096  # most headers end within it; where one does not, the whole file is read

# The usual file name extension of each format that training decodes.
_EXTENSIONS = {name: {"JPEG": "jpg"}.get(name, name.lower()) for name in DECODABLE}
TYPES = tuple(_EXTENSIONS.values())


def image_type(data: bytes) -> str | None:
    """One of `TYPES` by the first bytes of a file, or None."""
    return _EXTENSIONS.get(format_of(data))


def image_fault(
    head: bytes, read_all: Callable[[], bytes] | None, decode: bool
) -> tuple[str, str] | None:
    """Why an encoded image is of no use, as (one of `faults.REASONS`, detail), or None.

    Args:
      head: its first bytes, or all of them.
      read_all: reads all of them, asked if the header is longer than `head`; None: `head` is all.
      decode: whether to decode all pixels; `head` is then all of the file.
    """
    kind = format_of(head)
    if kind not in DECODABLE:
        return UNDECODABLE, unknown_format(head)
    fault = _open(head, kind, decode)
    if fault is None or read_all is None:
        return fault
    return _open(read_all(), kind, decode)


def _open(data: bytes, kind: str, decode: bool) -> tuple[str, str] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[kind.upper()]) as image:
            if decode:
                image.load()
    except Image.DecompressionBombError as error:
        return TOO_LARGE, str(error)
    except Exception as error:  # Pillow raises of every kind on damaged files
        message = (
            "no decodable header" if isinstance(error, Image.UnidentifiedImageError) else error
        )
        return UNDECODABLE, f"{kind}: {message}"
    return None

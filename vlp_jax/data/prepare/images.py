"""Telling an encoded image's type by its content, and looking whether it can be decoded."""

from __future__ import annotations

import io
from collections.abc import Callable

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE

HEAD_BYTES = 4096  # most headers end within it; where one does not, the whole file is read

# By what a file begins with: https://www.iana.org/assignments/media-types and each format's own
# specification. The names are the usual file name extensions.
_MAGIC = (("jpg", b"\xff\xd8\xff"), ("png", b"\x89PNG\r\n\x1a\n"), ("gif", b"GIF8"), ("bmp", b"BM"))
_PILLOW = {"jpg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP"}
TYPES = tuple(_PILLOW)


def image_type(data: bytes) -> str | None:
    """One of `TYPES` by the first bytes of a file, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return next((name for name, magic in _MAGIC if data.startswith(magic)), None)


def image_fault(
    head: bytes, read_all: Callable[[], bytes] | None, decode: bool
) -> tuple[str, str] | None:
    """Why an encoded image is of no use, as (one of `faults.REASONS`, detail), or None.

    Args:
      head: its first bytes, or all of them.
      read_all: reads all of them, asked if the header is longer than `head`; None: `head` is all.
      decode: whether to decode all pixels; `head` is then all of the file.
    """
    kind = image_type(head)
    if kind is None:
        begin = f"it begins with {head[:8]!r}" if head else "it is empty"
        return UNDECODABLE, f"not a {', '.join(TYPES)} image: {begin}"
    fault = _open(head, _PILLOW[kind], decode)
    if fault is None or read_all is None:
        return fault
    return _open(read_all(), _PILLOW[kind], decode)


def _open(data: bytes, kind: str, decode: bool) -> tuple[str, str] | None:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
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

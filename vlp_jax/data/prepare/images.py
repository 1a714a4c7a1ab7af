"""The type of an encoded image by its content, and whether it can be decoded."""

from __future__ import annotations

import io

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE
from vlp_jax.data.image_ops.formats import DECODABLE, format_of, unknown_format

# The usual file name extension of each format that training decodes.
_EXTENSIONS = {name: {"JPEG": "jpg"}.get(name, name.lower()) for name in DECODABLE}


def image_type(image: bytes) -> str | None:
    """The usual file name extension of an image's format; None for a format that is not known."""
    return _EXTENSIONS.get(format_of(image))


def image_fault(image: bytes, decode: bool) -> tuple[str, str] | None:
    """Why an encoded image cannot be used: (one of `faults.REASONS`, detail), or None.

    Args:
      image: all of the file.
      decode: whether to decode all pixels; else only the header is read.
    """
    from PIL import Image

    kind = format_of(image)
    if kind not in DECODABLE:
        return UNDECODABLE, unknown_format(image)
    try:
        with Image.open(io.BytesIO(image), formats=[kind.upper()]) as opened:
            # Opening reads the header alone; of WebP it decodes the first frame.
            if decode:
                opened.load()
    except Image.DecompressionBombError as error:
        return TOO_LARGE, str(error)
    except Image.UnidentifiedImageError:
        return UNDECODABLE, f"{kind}: no header that Pillow can read"
    except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
        return UNDECODABLE, f"{kind}: {error}"
    return None

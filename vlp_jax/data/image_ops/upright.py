"""An image of any kind as upright RGB, by Pillow: the pixels that training is held to.

`vlp_jax.load` and the page call `upright_rgb` on every image. Training calls it on the files that
TensorFlow does not decode, or decodes to other colours (`headers.py`), and asks `orientation` about
the metadata of the rest.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import PIL.Image

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE

MAX_PIXELS = 178_956_970  # twice Image.MAX_IMAGE_PIXELS: where Pillow raises DecompressionBombError
ORIENTATION = 0x0112  # the tag of Exif and TIFF

_TURNS = {
    2: PIL.Image.Transpose.FLIP_LEFT_RIGHT,
    3: PIL.Image.Transpose.ROTATE_180,
    4: PIL.Image.Transpose.FLIP_TOP_BOTTOM,
    5: PIL.Image.Transpose.TRANSPOSE,
    6: PIL.Image.Transpose.ROTATE_270,
    7: PIL.Image.Transpose.TRANSVERSE,
    8: PIL.Image.Transpose.ROTATE_90,
}


def orientation(image: PIL.Image.Image) -> int:
    """The orientation, 1 to 8, that Pillow reads from an image's Exif, raw profile or XMP.

    Exif comes before XMP. Metadata that cannot be read, and numbers that are no orientation, are 1.

    Source: Pillow's `Image.getexif`, as `ImageOps.exif_transpose` asks it; Exif 2.32, 4.6.4.
    """
    try:
        value = image.getexif().get(ORIENTATION, 1)
    except Exception:  # Pillow raises errors of a dozen kinds on damaged metadata
        return 1
    return int(value) if value in range(1, 9) else 1


def orientation_of(info: dict[str, Any]) -> int:
    """The orientation of an image whose `info` in Pillow would be this ("exif", "xmp": bytes)."""
    if not info:
        return 1
    image = PIL.Image.new("1", (1, 1))
    image.info = info
    return orientation(image)


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """A Pillow image in RGB, turned as its orientation says.

    Transparency is composited on white, 16 bits keep their upper 8, an animation its first frame.
    Profiles of colour (ICC, gAMA, cICP) are not applied. The result carries no metadata.
    """
    # Loading an image takes its tiles away, and with them the depth of the stored samples.
    rawmode = next((tile[3] for tile in getattr(image, "tile", [])), "")
    if getattr(image, "is_animated", False):
        image.seek(0)
    image.load()
    turn = _TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode.startswith("I"):  # 16 bits of grey, in whatever order of bytes
        return _deep_grey(image)
    if isinstance(rawmode, str) and rawmode in _SCALES and "transparency" in image.info:
        image = image.copy()
        image.info["transparency"] = _SCALES[rawmode](image.info["transparency"])
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = PIL.Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = PIL.Image.alpha_composite(white, image)
    image = image.convert("RGB")
    image.info = {}  # an orientation would have it turned again
    return image


# A transparent colour in a PNG counts in samples as stored, Pillow compares it with pixels of 8
# bits: from the mode of the stored samples to the colour in 8 bits.
_SCALES = {
    "L;2": lambda grey: grey * 85,
    "L;4": lambda grey: grey * 17,
    "RGB;16B": lambda color: tuple(sample >> 8 for sample in color),
}


def _deep_grey(image: PIL.Image.Image) -> PIL.Image.Image:
    pixels = np.clip(np.asarray(image, np.int64), 0, 65535)
    grey = (pixels >> 8).astype(np.uint8)
    if "transparency" in image.info:
        grey[pixels == image.info["transparency"]] = 255
    return PIL.Image.fromarray(grey).convert("RGB")


class Refused(Exception):
    """An image that is not decoded: one of `faults.REASONS`, and a detail in one line."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Raises Refused unless an image has at least one pixel and at most `max_pixels`."""
    if min(width, height) < 1:
        raise Refused(UNDECODABLE, f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise Refused(TOO_LARGE, f"more than {max_pixels} pixels")

"""Formats of image files, and upright RGB of any by Pillow, whose pixels training reproduces.

`vlp_jax.load` and the page call `upright_rgb` on every image. Training leaves JPEGs to TensorFlow,
which is faster, and asks `jpeg_orientation` about them; `read` decodes all other files. TensorFlow
2.21 would read them otherwise: it takes the palette of a BMP for shades of grey and any bit masks
for B, G, R, ignores the transparent colour of grey and RGB PNGs, makes transparent pixels of a GIF
black, inverts CMYK JPEGs without Adobe's segment, and writes past the end of its buffer when it
decodes an animated WebP.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Iterator

import numpy as np
import PIL.Image
from PIL.JpegImagePlugin import JpegImageFile

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE, BadExample

# What files begin with, by https://www.iana.org/assignments/media-types and each specification.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    b"\0\0\1\0": "ICO",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\xff\x0a": "JPEG XL",
    b"8BPS": "PSD",
    b"%PDF": "PDF",
    b"<svg": "SVG",
    b"<?xml": "XML",
    b"<html": "HTML",
    b"<!doctype": "HTML",
}
DECODABLE = ("JPEG", "PNG", "WebP", "GIF", "BMP")
_HEIF_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"}  # all other brands count as HEIC


def format_of(data: bytes) -> str | None:
    """The name of a file's format, one of `DECODABLE` or another, by its first bytes, or None."""
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WebP"
    if data[4:8] == b"ftyp":
        return _HEIF_BRANDS.get(data[8:12], "HEIC")
    # Pages and SVG may begin with a byte order mark and white space.
    text = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    known = _MAGIC.items()
    return next((n for magic, n in known if data.startswith(magic) or text.startswith(magic)), None)


def unknown_format(data: bytes) -> str:
    """Describes a file of none of the `DECODABLE` formats, for an error's detail."""
    known = f"{', '.join(DECODABLE[:-1])} and {DECODABLE[-1]} are decoded"
    if not data:
        return f"the file is empty; {known}"
    found = format_of(data)
    told = f"a file of the format {found}" if found else f"no image: it begins with {data[:8]!r}"
    return f"{told}; {known}"


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


def jpeg_orientation(head: bytes) -> int:
    """The orientation, 1 to 8, of a JPEG that TensorFlow decodes; 0 if Pillow has to decode it.

    Pillow decodes CMYK, and files whose first scan begins after `head`.
    """
    try:
        # Not Image.open, which looks for a second picture behind the first.
        image = JpegImageFile(io.BytesIO(head))
    except Exception:  # Pillow raises errors of a dozen kinds on damaged files
        return 0
    return 0 if image.mode == "CMYK" else orientation(image)


def read(data: bytes, max_pixels: int) -> np.ndarray:
    """Decodes a file by Pillow to upright pixels, uint8 [height, width, 3].

    Raises BadExample if it is no image, damaged, or has more than `max_pixels` (nothing is
    decoded).
    """
    found = format_of(data)
    if found not in DECODABLE:
        raise BadExample(UNDECODABLE, unknown_format(data))
    with pillow_errors(found):
        # Pillow asks for the memory of a WebP when it opens the file, of others when it loads them.
        if found == "WebP":
            require_size(*_webp_size(data), max_pixels)
        with _open(data, found) as image:
            require_size(*image.size, max_pixels)
            return np.asarray(upright_rgb(image))


@contextlib.contextmanager
def pillow_errors(found: str) -> Iterator[None]:
    """Raises BadExample for whatever Pillow raises on a file of the format `found`."""
    try:
        yield
    except BadExample:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise BadExample(TOO_LARGE, str(error)) from None
    except PIL.UnidentifiedImageError:
        raise BadExample(UNDECODABLE, f"{found}: no header that Pillow can read") from None
    except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
        raise BadExample(UNDECODABLE, f"{found}: {error}") from None


def _open(data: bytes, found: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(io.BytesIO(data), formats=[found.upper()])
    except ValueError:
        # A text of a PNG that inflates beyond Pillow's bound: the pixels are sound without it.
        if found != "PNG":
            raise
        return PIL.Image.open(io.BytesIO(_without_metadata(data)), formats=["PNG"])


def _without_metadata(png: bytes) -> bytes:
    """A PNG without compressed texts and Exif (W3C PNG, third edition, 5.3 and 11.3)."""
    kept, place = [png[:8]], 8
    while place + 8 <= len(png):
        length, kind = struct.unpack_from(">I4s", png, place)
        end = place + 12 + length
        if kind not in (b"zTXt", b"iTXt", b"eXIf"):
            kept.append(png[place:end])
        place = end
    return b"".join(kept)


def _webp_size(data: bytes) -> tuple[int, int]:
    """Width and height of a WebP, whose memory Pillow asks for when it opens the file.

    Source: RFC 9649 (VP8X, 2.7; VP8L, 3.4), RFC 6386 (VP8 frame header, 9.1).
    """
    kind, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise BadExample(UNDECODABLE, "WebP: the header is cut short")
    if kind == b"VP8X":
        return tuple(1 + int.from_bytes(body[n : n + 3], "little") for n in (4, 7))
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def upright_rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    """Converts a Pillow image to RGB and turns it as its orientation says.

    Transparency is composited on white, 16 bits keep their upper 8, an animation its first frame.
    Profiles of colour (ICC, gAMA, cICP) are not applied. The result carries no metadata.
    """
    # Loading an image takes its tiles away, and with them the depth of the stored samples.
    rawmode = next((tile[3] for tile in getattr(image, "tile", [])), "")
    # A caller may have moved to another frame.
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


def require_size(width: int, height: int, max_pixels: int) -> None:
    """Raises BadExample unless an image has at least one pixel and at most `max_pixels`."""
    if min(width, height) < 1:
        raise BadExample(UNDECODABLE, f"{width} x {height} pixels")
    if width * height > max_pixels:
        raise BadExample(TOO_LARGE, f"more than {max_pixels} pixels")

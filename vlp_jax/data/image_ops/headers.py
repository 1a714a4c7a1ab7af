"""How an image file is to be decoded, by its bytes, in plain Python.

TensorFlow decodes JPEG, PNG and still WebP to the pixels that Pillow decodes, save for the
orientation, which `jpeg_orientation` and `read` find. Of the rest `read` returns Pillow's pixels:
TensorFlow 2.21 takes the palette of a BMP for shades of grey and the bit masks of any BMP for B, G,
R, ignores the transparent colour of grey and RGB PNGs, makes transparent pixels of a GIF black,
inverts CMYK JPEGs without Adobe's segment, and writes past the end of its buffer when it decodes an
animated WebP.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
import PIL.Image

from vlp_jax.data.faults import TOO_LARGE, UNDECODABLE
from vlp_jax.data.image_ops.upright import (
    Refused,
    orientation,
    orientation_of,
    require_size,
    upright_rgb,
)

_PNG = b"\x89PNG\r\n\x1a\n"
# What files begin with, by https://www.iana.org/assignments/media-types and each specification.
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    _PNG: "PNG",
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
    text = data[:64].lstrip(b"\xef\xbb\xbf \r\n\t").lower()
    known = _MAGIC.items()
    return next((n for magic, n in known if data.startswith(magic) or text.startswith(magic)), None)


def unknown_format(data: bytes) -> str:
    """Says what a file is that has none of the `DECODABLE` formats, for an error's detail."""
    known = f"{', '.join(DECODABLE[:-1])} and {DECODABLE[-1]} are decoded"
    if not data:
        return f"the file is empty; {known}"
    found = format_of(data)
    told = f"a file of the format {found}" if found else f"no image: it begins with {data[:8]!r}"
    return f"{told}; {known}"


def jpeg_orientation(head: bytes) -> int:
    """The orientation, 1 to 8, of a JPEG that TensorFlow decodes; 0 if Pillow has to decode it.

    Pillow decodes CMYK, and files whose first scan begins after `head`. It reads segments as here:
    it skips bytes between them, joins the Exif of several, and takes the last XMP.

    Source: ISO 10918-1, annex B; Exif 2.32, 4.5; XMP specification, part 3, 1.1.3.
    """
    info: dict[str, bytes] = {}
    place = 2
    try:
        while True:
            place = head.index(b"\xff", place) + 1
            marker = head[place]
            if marker == 0xDA:  # the scan begins: Pillow looks no further
                return orientation_of(info)
            if marker in (0, 0xFF) or 0xD0 <= marker <= 0xD9 or 0xF0 <= marker <= 0xFD:
                place += marker != 0xFF  # of fill bytes the last begins the marker
                continue
            (length,) = struct.unpack_from(">H", head, place + 1)
            body, place = head[place + 3 : place + 1 + length], place + 1 + length
            frame = 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)
            if frame and body[5] == 4:
                return 0
            if marker == 0xE1 and body.startswith(b"Exif\0\0"):
                info["exif"] = info["exif"] + body[6:] if "exif" in info else body
            elif marker == 0xE1 and body.startswith(b"http://ns.adobe.com/xap/1.0/\0"):
                info["xmp"] = body.split(b"\0", 1)[1]
    except (struct.error, IndexError, ValueError):
        return 0


def read(data: bytes, max_pixels: int) -> tuple[int, np.ndarray | None]:
    """Decides how a file is decoded, and decodes it if TensorFlow should not.

    Args:
      data: the file.
      max_pixels: of a larger image nothing is decoded.

    Returns:
      The orientation, 1 to 8, by which TensorFlow's pixels are to be turned, and None; or 1 and
      upright pixels, uint8 [h, w, 3].

    Raises:
      Refused: the file is no image, damaged, or too large.
    """
    found = format_of(data)
    if found not in DECODABLE:
        raise Refused(UNDECODABLE, unknown_format(data))
    try:
        turn = _READERS[found](data, max_pixels) if found in _READERS else None
    except (struct.error, IndexError):
        raise Refused(UNDECODABLE, f"{found}: the header is cut short") from None
    return (1, _by_pillow(data, found, max_pixels)) if turn is None else (turn, None)


def _by_pillow(data: bytes, found: str, max_pixels: int) -> np.ndarray:
    try:
        with PIL.Image.open(io.BytesIO(data), formats=[found.upper()]) as image:
            require_size(*image.size, max_pixels)
            return np.asarray(upright_rgb(image))
    except Refused:
        raise
    except PIL.Image.DecompressionBombError as error:
        raise Refused(TOO_LARGE, str(error)) from None
    except PIL.UnidentifiedImageError:
        raise Refused(UNDECODABLE, f"{found}: no header that Pillow can read") from None
    except Exception as error:  # Pillow raises errors of a dozen kinds on damaged files
        raise Refused(UNDECODABLE, f"{found}: {error}") from None


def _png(data: bytes, max_pixels: int) -> int | None:
    """The orientation, or None if Pillow has to decode the file.

    Source: W3C PNG, third edition, 5.3 and 11.3 (chunks IHDR, tRNS, eXIf and texts).
    """
    width, height, _, color = struct.unpack_from(">IIBB", data, 16)
    require_size(width, height, max_pixels)
    metadata: list[bytes] = []
    place, pixels_seen = 8, False
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        begin, place = place, place + 12 + length
        if kind == b"IEND" or (kind == b"fcTL" and pixels_seen):  # or a second frame
            break
        if kind == b"tRNS" and color in (0, 2):
            return None
        if kind == b"IDAT" and not pixels_seen:
            metadata.append(_chunk(b"IDAT", _PIXEL))
            pixels_seen = True
        if kind == b"eXIf" or (
            kind in (b"tEXt", b"zTXt", b"iTXt") and data.startswith(_KEYWORDS, begin + 8)
        ):
            metadata.append(data[begin:place])
    return _png_orientation(metadata)


# Texts of a PNG in which Pillow looks for an orientation.
_KEYWORDS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"exif\0")
_PIXEL = zlib.compress(b"\0\0")


def _png_orientation(chunks: list[bytes]) -> int:
    """The orientation that Pillow reads from chunks with metadata around an IDAT of one pixel.

    Pillow inflates the texts, up to its MAX_TEXT_CHUNK.
    """
    if len(chunks) < 2:
        return 1
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0))
    small = b"".join((_PNG, head, *chunks, _chunk(b"IEND", b"")))
    try:
        with PIL.Image.open(io.BytesIO(small), formats=["PNG"]) as image:
            return orientation(image)
    except Exception:  # Pillow raises errors of a dozen kinds on damaged metadata
        return 1


def _chunk(kind: bytes, body: bytes) -> bytes:
    check = struct.pack(">I", zlib.crc32(kind + body))
    return struct.pack(">I", len(body)) + kind + body + check


def _webp(data: bytes, max_pixels: int) -> int | None:
    """As `_png`. Source: RFC 9649 (container, 2.7), RFC 6386 (VP8 frame header, 9.1)."""
    chunks = list(_riff_chunks(data, 12))
    kind, body = chunks[0]
    if kind != b"VP8X":
        require_size(*_webp_size(kind, body), max_pixels)
        return 1
    flags = body[0]
    require_size(1 + _little24(body, 4), 1 + _little24(body, 7), max_pixels)
    if flags & 2:
        return None
    # libwebp gives the first of each, and only what the flags announce.
    first = dict(reversed(chunks))
    wanted = (("exif", b"EXIF", 8), ("xmp", b"XMP ", 4))
    info = {key: first[name] for key, name, flag in wanted if flags & flag and first.get(name)}
    return orientation_of(info)


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    """Width and height."""
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    width, height = struct.unpack_from("<HH", body, 6)
    return width & 0x3FFF, height & 0x3FFF


def _riff_chunks(data: bytes, place: int) -> Iterator[tuple[bytes, bytes]]:
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        yield kind, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _little24(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 3], "little")


_READERS = {"PNG": _png, "WebP": _webp}

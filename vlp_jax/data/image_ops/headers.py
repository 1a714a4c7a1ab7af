"""What the bytes of an image file say before it is decoded, in plain Python.

`exif_orientation` reads JPEGs. `prepare` reads the other formats and rewrites files that TensorFlow
decodes wrongly: animations, transparent GIFs, and BMPs with a palette.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

import numpy as np

_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Header:
    """What decoding needs to know of a file that is not a JPEG.

    Attributes:
      height, width: of the image, or of the canvas of an animation, in pixels.
      orientation: of Exif, 1 to 8.
      key: a colour, 0 to 255, that stands for transparent; -1 three times if none does.
      top, left: place of the (first) frame on the canvas, in pixels.
      data: a file that TensorFlow decodes to the (first) frame.
    """

    height: int
    width: int
    data: bytes
    orientation: int = 1
    key: tuple[int, int, int] = (-1, -1, -1)
    top: int = 0
    left: int = 0

    def numbers(self) -> np.ndarray:
        """int32 [8]: height, width, orientation, key, top, left."""
        return np.array(
            [self.height, self.width, self.orientation, *self.key, self.top, self.left], np.int32
        )


def prepare(data: bytes, max_pixels: int) -> Header | None:
    """Reads the header of a PNG, WebP, GIF or BMP; None if it is none of them, or cut short.

    Args:
      data: the file.
      max_pixels: files of more are not rewritten.
    """
    try:
        if data[:8] == _PNG and data[12:16] == b"IHDR":
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif(data)
        if data[:2] == b"BM":
            return _bmp(data, max_pixels)
    except (struct.error, IndexError, ValueError):
        return None
    return None


def exif_orientation(head: bytes) -> int:
    """The orientation, 1 to 8, that the Exif segment of a JPEG gives; 1 if it gives none.

    Args:
      head: the beginning of the file.

    Source: Exif 2.32, sections 4.5 and 4.6 (TIFF tag 0x0112 in the zeroth IFD).
    """
    place = 2
    while place + 4 <= len(head) and head[place] == 0xFF:
        marker, length = struct.unpack_from(">BH", head, place + 1)
        if marker == 0xDA:
            break
        if marker == 0xE1 and head[place + 4 : place + 10] == b"Exif\0\0":
            return _tiff_orientation(head[place + 10 : place + 2 + length])
        place += 2 + length
    return 1


def _tiff_orientation(tiff: bytes) -> int:
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) < 8:
        return 1
    (directory,) = struct.unpack_from(order + "I", tiff, 4)
    if directory + 2 > len(tiff):
        return 1
    (count,) = struct.unpack_from(order + "H", tiff, directory)
    for start in range(directory + 2, min(directory + 2 + 12 * count, len(tiff) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", tiff, start)
        if (tag, kind) == (0x0112, 3):
            return value if 1 <= value <= 8 else 1
    return 1


def _png(data: bytes) -> Header:
    """Source: W3C PNG, third edition, 5.3 and 11.3 (chunks IHDR, tRNS, eXIf)."""
    width, height, depth, color = struct.unpack_from(">IIBB", data, 16)
    header = Header(height, width, data)
    place = 8
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        start = place + 8
        if kind == b"tRNS" and color in (0, 2):
            # TensorFlow heeds it in images with a palette alone. It gives 16 bits as their upper 8,
            # and fewer than 8 stretched to 0 to 255.
            key = struct.unpack_from(">H" if color == 0 else ">HHH", data, start)
            values = [v >> 8 if depth == 16 else v * 255 // (2**depth - 1) for v in key]
            header = replace(header, key=tuple(values * (3 if color == 0 else 1)))
        if kind == b"eXIf":
            orientation = _tiff_orientation(data[start : start + length])
            header = replace(header, orientation=orientation)
        place = start + length + 4
    return header


def _webp(data: bytes) -> Header:
    """Source: RFC 9649 (container, 2.7), RFC 6386 (VP8 frame header, 9.1)."""
    chunks = list(_riff_chunks(data, 12))
    kind, body = chunks[0]
    if kind != b"VP8X":
        height, width = _webp_size(kind, body)
        return Header(height, width, data)
    flags = body[0]
    width, height = 1 + _little24(body, 4), 1 + _little24(body, 7)
    header = Header(height, width, data)
    for kind, body in chunks:
        if kind == b"EXIF":
            tiff = body[6:] if body[:6] == b"Exif\0\0" else body
            header = replace(header, orientation=_tiff_orientation(tiff))
    frames = [body for kind, body in chunks if kind == b"ANMF"]
    if flags & 2 and frames:
        # TensorFlow 2.21 writes past the end of its buffer when it decodes an animation.
        left, top = 2 * _little24(frames[0], 0), 2 * _little24(frames[0], 3)
        header = replace(header, data=_still_webp(frames[0]), top=top, left=left)
    return header


def _still_webp(frame: bytes) -> bytes:
    """A WebP file of the one frame that an ANMF chunk holds."""
    size = frame[6:12]  # width and height less one, 24 bits each, as VP8X has them
    inner = [(kind, body) for kind, body in _riff_chunks(frame, 16)]
    alpha = any(kind in (b"ALPH", b"VP8L") for kind, _ in inner)
    chunks = [(b"VP8X", bytes([0x10 if alpha else 0, 0, 0, 0]) + size), *inner]
    packed = b"".join(
        kind + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
        for kind, body in chunks
        if kind in (b"VP8X", b"ALPH", b"VP8 ", b"VP8L")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(packed)) + b"WEBP" + packed


def _webp_size(kind: bytes, body: bytes) -> tuple[int, int]:
    if kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", body, 1)
        return 1 + (bits >> 14 & 0x3FFF), 1 + (bits & 0x3FFF)
    width, height = struct.unpack_from("<HH", body, 6)
    return height & 0x3FFF, width & 0x3FFF


def _riff_chunks(data: bytes, place: int):
    while place + 8 <= len(data):
        kind, length = struct.unpack_from("<4sI", data, place)
        yield kind, data[place + 8 : place + 8 + length]
        place += 8 + length + length % 2


def _little24(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 3], "little")


def _gif(data: bytes) -> Header:
    """The first frame alone, its transparent colour made white. Source: GIF89a, sections 18-24."""
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    table, place, transparent = 13, 13 + _table_size(packed), None
    control = place
    while data[place] == 0x21:
        if data[place + 1] == 0xF9:
            control, flags = place, data[place + 3]
            transparent = data[place + 6] if flags & 1 else None
        place = _after_blocks(data, place + 2)
    if data[place] != 0x2C:
        return Header(height, width, data)
    left, top, columns, rows, local = struct.unpack_from("<HHHHB", data, place + 1)
    if local & 0x80:
        table = place + 10
    still = bytearray(data[: _after_blocks(data, place + 11 + _table_size(local))] + b";")
    if transparent is not None:
        still[control + 3] &= 0xFE
        still[table + 3 * transparent : table + 3 * transparent + 3] = b"\xff\xff\xff"
    return Header(max(height, top + rows), max(width, left + columns), bytes(still))


def _table_size(packed: int) -> int:
    return 3 * 2 ** (1 + (packed & 7)) if packed & 0x80 else 0


def _after_blocks(data: bytes, place: int) -> int:
    while data[place]:
        place += 1 + data[place]
    return place + 1


def _bmp(data: bytes, max_pixels: int) -> Header:
    """Source: Microsoft, BITMAPCOREHEADER and BITMAPINFOHEADER."""
    offset, size = struct.unpack_from("<II", data, 10)
    if size == 12:
        width, height, _, bits = struct.unpack_from("<HHHH", data, 18)
        compression = used = 0
    else:
        fields = struct.unpack_from("<iiHHIIiiI", data, 18)
        width, height, _, bits, compression, *_, used = fields
    header = Header(abs(height), width, data)
    if bits not in (1, 4, 8) or compression or not 0 < width * abs(height) <= max_pixels:
        return header
    # TensorFlow takes the places in the palette for shades of grey.
    stride = (width * bits + 31) // 32 * 4
    entry = 3 if size == 12 else 4
    table = np.frombuffer(data, np.uint8, entry * (used or 2**bits), 14 + size)
    table = table.reshape(-1, entry)[:, :3]
    rows = np.frombuffer(data, np.uint8, stride * abs(height), offset).reshape(abs(height), stride)
    places = np.unpackbits(rows, axis=1).reshape(abs(height), -1, bits)[:, :width]
    places = places @ (1 << np.arange(bits, dtype=np.uint8)[::-1])
    pixels = np.zeros((abs(height), (3 * width + 3) // 4 * 4), np.uint8)
    pixels[:, : 3 * width] = table[np.minimum(places, len(table) - 1)].reshape(abs(height), -1)
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, pixels.size, 0, 0, 0, 0)
    start = struct.pack("<2sIHHI", b"BM", 54 + pixels.size, 0, 0, 54)
    return replace(header, data=start + info + pixels.tobytes())

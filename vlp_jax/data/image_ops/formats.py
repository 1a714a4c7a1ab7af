"""Formats of image files by their first bytes."""

from __future__ import annotations

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

"""The kind of a file by its first bytes, for messages about files that cannot be read."""

from __future__ import annotations

HEAD_BYTES = 512
GZIP = "compressed by gzip"

# First bytes -> what such a file is, and the command that makes something readable of it.
_KINDS: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", GZIP, "gunzip"),
    (b"BZh", "compressed by bzip2", "bunzip2"),
    (b"\xfd7zXZ\0", "compressed by xz", "unxz"),
    (b"\x28\xb5\x2f\xfd", "compressed by Zstandard", "unzstd"),
    (b"\x04\x22\x4d\x18", "compressed by lz4", "unlz4"),
    (b"PK\x03\x04", "a zip archive", "unzip"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "7z x"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file", "git lfs pull"),
    (b"PAR1", "a Parquet file", ""),
    (b"ARROW1", "an Arrow file", ""),
    (b"\x89HDF", "an HDF5 file", ""),
    (b"\xff\xd8\xff", "a JPEG image", ""),
    (b"\x89PNG", "a PNG image", ""),
)


def kind_of(head: bytes) -> str:
    """The kind of a file that begins with `head` (`HEAD_BYTES` or all of it); "" if not known."""
    if not head:
        return "empty (0 bytes)"
    for signature, kind, _ in _KINDS:
        if head.startswith(signature):
            return kind
    # The magic of a tar stands inside of its first header, behind names and numbers.
    if head[257:262] == b"ustar":
        return "a tar"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<head", b"<?xml")):
        return "a page of HTML or XML: a server's message, not the file"
    if text.startswith((b"{", b"[")):
        return "JSON text"
    return "all zeros" if not head.strip(b"\0") else ""


def remedy(kind: str, path: str) -> str:
    """The command that makes the readable file of a file of `kind`; "" if there is none."""
    return next((f"{command} {path}" for _, k, command in _KINDS if k == kind and command), "")

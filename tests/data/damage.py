"""A corpus of which a known part is damaged, each kind of fault in a known number of examples."""

import struct
import zlib

import corpora

COUNT = 240
TEXTLESS, EMPTY, GARBAGE, CUT, HUGE = range(5)
# Which examples are damaged how: 11 of 240, and one more where the last file is cut.
DAMAGED = {
    17: TEXTLESS, 101: TEXTLESS,
    33: EMPTY, 200: EMPTY,
    5: GARBAGE, 60: GARBAGE, 177: GARBAGE,
    90: CUT, 140: CUT,
    44: HUGE, 222: HUGE,
}  # fmt: skip
TRUNCATED = "truncated shard"
COUNTS = {
    "missing field": 2,
    "empty caption": 2,
    "undecodable image": 5,
    "image too large": 2,
    TRUNCATED: 1,
}


def counts(kind):
    """Bad examples of the damaged corpus by reason."""
    return {reason: n for reason, n in COUNTS.items() if (kind, reason) != ("parquet", TRUNCATED)}


def huge_png(side=20_000):
    """A small PNG file that says it is an image of `side` x `side` pixels."""

    def part(kind, content):
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", head) + part(b"IDAT", pixels) + part(b"IEND", b"")


def rows(damaged=True):
    """The examples, whole or with those of `DAMAGED` damaged."""
    examples = corpora.examples(COUNT)
    for number, kind in DAMAGED.items() if damaged else ():
        row = examples[number]
        if kind == TEXTLESS:
            row["text"] = None
        elif kind == EMPTY:
            row["text"] = " \n"
        elif kind == GARBAGE:
            row["image"] = b"this is no image"
        elif kind == CUT:
            row["image"] = row["image"][: len(row["image"]) // 2]
        elif kind == HUGE:
            row["image"] = huge_png()
    return examples


def write(kind, folder, damaged=True):
    """The data config of the corpus; see `counts`.

    In the damaged one the end of the last tar or TFRecord file is cut off, and with it the last
    example. A Parquet file has its index there: a cut one is lost, which test_faults.py shows.
    """
    data = corpora.config(kind, folder, rows(damaged), shards=4, lanes=4, window=2)
    files = sorted(path for path in (folder / kind).iterdir() if path.suffix != ".json")
    if damaged and kind != "parquet":
        whole = files[-1].read_bytes()
        # A tar ends in two to twenty blocks of zeros.
        end = len(whole.rstrip(b"\0")) if kind == "webdataset" else len(whole)
        cut = _last_image(whole) if kind == "webdataset" else end - 20
        files[-1].write_bytes(whole[:cut])
    return data


def _last_image(tar):
    """Within the bytes of a tar's last image."""
    return tar.rindex(b"\xff\xd8\xff") + 100

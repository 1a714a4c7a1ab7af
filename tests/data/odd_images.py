"""Image files whose pixels are not simply RGB as they stand: the kinds that people have."""

import io
import struct
import zlib

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

SIDES = 48, 64  # height and width


def picture(height=48, width=64):
    corners = np.array([[[250, 10, 10], [10, 240, 10]], [[10, 10, 230], [240, 240, 20]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def with_alpha():
    image = picture()
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(48, 0)
    image.putalpha(Image.fromarray(ramp))
    return image


def kinds():
    grey, few, red = (
        picture().convert("L"),
        picture().quantize(8),
        Image.new("RGB", (64, 48), "red"),
    )
    flat = few.convert("RGB")
    exact = {"lossless": True, "exact": True}
    animated = {"save_all": True, "append_images": [red, red]}
    yield "png grey with a transparent shade", encoded(grey, "png", transparency=100)
    key = flat.getpixel((5, 5))
    yield "png with a transparent colour", encoded(flat, "png", transparency=key)
    yield "png palette", encoded(few, "png", transparency=bytes([0, 50, 100, 150, 200]))
    yield "png 1 bit", encoded(picture().convert("1"), "png")
    yield "png palette 2 bits", encoded(picture().quantize(4), "png", bits=2)
    yield "png grey and alpha", encoded(with_alpha().convert("LA"), "png")
    yield "png alpha", encoded(with_alpha(), "png")
    yield "png animated", encoded(picture(), "png", **animated)
    yield "png animated after another", encoded(picture(), "png", default_image=True, **animated)
    yield "png with a profile", encoded(picture(), "png", icc_profile=b"x" * 200)
    yield (
        "png with a gamma",
        with_chunk(encoded(picture(), "png"), b"gAMA", struct.pack(">I", 99999)),
    )
    yield "png with cICP", with_chunk(encoded(picture(), "png"), b"cICP", bytes([9, 16, 0, 1]))
    yield "png and more bytes", encoded(picture(), "png") + b"more" * 99
    yield "gif", encoded(few, "gif")
    yield "gif interlaced, transparent", encoded(few, "gif", transparency=2, interlace=True)
    yield "gif animated", encoded(few, "gif", **animated)
    yield "gif animated, transparent", encoded(few, "gif", transparency=1, **animated)
    yield "gif disposed of", encoded(few, "gif", transparency=1, disposal=2, **animated)
    yield "gif beyond its canvas", at(encoded(few, "gif"), b",", 1, struct.pack("<HH", 20, 10))
    yield "gif on a larger canvas", at(encoded(few, "gif"), b"GIF", 6, struct.pack("<HH", 99, 70))
    yield "webp alpha", encoded(with_alpha(), "webp", **exact)
    yield "webp lossy", encoded(picture(), "webp", quality=90)
    yield "webp animated", encoded(picture(), "webp", lossless=True, **animated)
    yield "webp animated, lossy alpha", encoded(with_alpha(), "webp", quality=80, **animated)
    yield "jpeg", encoded(picture(), "jpeg", quality=95)
    yield "jpeg grey", encoded(grey, "jpeg", quality=95)
    yield "jpeg progressive", encoded(picture(), "jpeg", quality=95, progressive=True)
    yield "jpeg and more bytes", encoded(picture(), "jpeg", quality=95) + b"\xff\xd9more" * 99
    yield "jpeg RGB", encoded(picture(), "jpeg", quality=95, keep_rgb=True)
    yield "jpeg of two", encoded(picture(), "mpo", quality=95, **animated)
    cmyk = encoded(picture().convert("CMYK"), "jpeg", quality=95)
    yield "jpeg cmyk", cmyk
    yield "jpeg ycck", at(cmyk, b"Adobe", 11, b"\x02")
    bare = cmyk.replace(adobe := segment(cmyk, 0xEE), b"")
    yield "jpeg cmyk without Adobe", bare
    yield "jpeg cmyk with JFIF", bare[:2] + segment(encoded(picture(), "jpeg"), 0xE0) + bare[2:]
    assert len(adobe) == 16


def turned():
    """Files with an orientation, wherever writers put it, and some that only seem to have one."""
    jpeg, png, webp = (
        encoded(picture(), kind, **options)
        for kind, options in (("jpeg", {"quality": 98}), ("png", {}), ("webp", {"lossless": True}))
    )
    for number in range(9 + 1):
        yield f"jpeg exif {number}", with_app1(jpeg, exif(number))
        yield f"png exif {number}", with_chunk(png, b"eXIf", exif(number)[6:])
    yield "jpeg exif of Motorola's order", with_app1(jpeg, exif(6, ">"))
    yield "jpeg exif as a long", with_app1(jpeg, exif(6, kind=4))
    yield "jpeg exif as a byte", with_app1(jpeg, exif(6, kind=1))
    yield "jpeg exif damaged", with_app1(jpeg, exif(6)[:12])
    yield "jpeg exif of no TIFF", with_app1(jpeg, b"Exif\0\0nothing")
    yield "jpeg xmp", with_app1(jpeg, xmp(6))
    yield "jpeg xmp element", with_app1(jpeg, xmp(8, element=True))
    yield "jpeg xmp behind exif", with_app1(with_app1(jpeg, xmp(6)), exif(None))
    yield "jpeg exif against xmp", with_app1(with_app1(jpeg, exif(3)), xmp(6))
    yield "jpeg exif of 0 against xmp", with_app1(with_app1(jpeg, exif(0)), xmp(6))
    yield "jpeg two xmp", with_app1(with_app1(jpeg, xmp(3)), xmp(6))
    yield "jpeg two exif", with_app1(with_app1(jpeg, exif(3)), exif(6))
    yield "jpeg exif behind a profile", with_app1(jpeg, exif(6), b"\xff\xe2\x0b\xb8" + bytes(2998))
    comment = b"\xff\xfe\0\x0ca comment.."
    yield "jpeg exif behind a comment", with_app1(jpeg, exif(7), comment)
    yield (
        "jpeg exif behind a large profile",
        with_app1(jpeg, exif(6), (b"\xff\xe2\xff\xff" + bytes(65533)) * 5),
    )
    yield "jpeg exif behind the tables", with_app1(jpeg, exif(6), place=jpeg.index(b"\xff\xc0"))
    yield "jpeg exif behind fill bytes", with_app1(jpeg, exif(5), b"\xff\xff\xff")
    yield "jpeg exif first", with_app1(jpeg, exif(6), place=2)
    cmyk = encoded(picture().convert("CMYK"), "jpeg", quality=98)
    yield "jpeg cmyk exif", with_app1(cmyk, exif(6), place=2)
    profile = f"\nexif\n{len(exif(6)):8}\n{exif(6).hex()}\n"
    for name, options in (("tEXt", {}), ("zTXt", {"zip": True})):
        texts = PngInfo()
        texts.add_text("Raw profile type exif", profile, **options)
        yield f"png raw profile {name}", encoded(picture(), "png", pnginfo=texts)
    texts = PngInfo()
    texts.add_text("Raw profile type APP1", profile, zip=True)
    yield "png raw profile APP1", encoded(picture(), "png", pnginfo=texts)
    for name, options in (("iTXt", {}), ("iTXt, compressed", {"zip": True})):
        texts = PngInfo()
        texts.add_itxt("XML:com.adobe.xmp", xmp(6).split(b"\0")[1].decode(), **options)
        yield f"png xmp {name}", encoded(picture(), "png", pnginfo=texts)
        yield f"png xmp and alpha {name}", encoded(with_alpha(), "png", pnginfo=texts)
    few = picture().quantize(8)
    key = few.convert("RGB").getpixel((5, 5))
    yield "png colour, exif", encoded(few.convert("RGB"), "png", transparency=key, exif=exif(6))
    yield "png palette, exif", encoded(few, "png", transparency=bytes([0, 90]), exif=exif(5))
    yield "png exif behind the pixels", with_chunk(png, b"eXIf", exif(6)[6:], b"IEND")
    yield "webp exif", encoded(picture(), "webp", lossless=True, exif=exif(6))
    yield "webp xmp", encoded(picture(), "webp", lossless=True, xmp=xmp(6).split(b"\0")[1])
    flagged = encoded(picture(), "webp", lossless=True, exif=exif(8))
    yield "webp exif against its flags", flagged[:20] + b"\0" + flagged[21:]
    red = Image.new("RGB", (64, 48), "red")
    yield (
        "webp animated, exif",
        encoded(picture(), "webp", lossless=True, save_all=True, append_images=[red], exif=exif(6)),
    )
    assert webp[12:16] == b"VP8L"


def exif(orientation, order="<", kind=3):
    """An Exif block, of the maker's name alone if the orientation is None."""
    entries = [(0x010F, 2, 3, b"ab\0\0")]
    if orientation is not None:
        value = struct.pack(order + {1: "B", 3: "H", 4: "I"}[kind], orientation)
        entries.append((0x0112, kind, 1, value.ljust(4, b"\0")))
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "IH", 8, len(entries))
    body = b"".join(struct.pack(order + "HHI", *entry[:3]) + entry[3] for entry in entries)
    return b"Exif\0\0" + head + body + bytes(4)


def xmp(orientation, element=False):
    told = f'tiff:Orientation="{orientation}"/>'
    if element:
        told = f"><tiff:Orientation>{orientation}</tiff:Orientation></rdf:Description>"
    text = f'<rdf:RDF><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" {told}</rdf:RDF>'
    return b"http://ns.adobe.com/xap/1.0/\0" + text.encode()


def with_app1(jpeg, body, before=b"", place=20):
    """A JPEG with an APP1 segment, after JFIF's unless `place` says another byte."""
    added = before + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body
    return jpeg[:place] + added + jpeg[place:]


def segment(jpeg, marker):
    start = jpeg.index(bytes([0xFF, marker]))
    return jpeg[start : start + 2 + int.from_bytes(jpeg[start + 2 : start + 4], "big")]


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def with_chunk(png, kind, body, before=b"IDAT"):
    place = png.index(before) - 4
    return png[:place] + chunk(kind, body) + png[place:]


def at(data, anchor, offset, value):
    """The file with some bytes replaced, at an offset from the first place of others."""
    place = data.index(anchor) + offset
    return data[:place] + value + data[place + len(value) :]


def png(samples, color, depth, extra=b"", interlaced=0):
    """A PNG of samples [height, width, channels], which may be deep; Pillow writes few kinds."""
    height, width = samples.shape[:2]
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, interlaced))
    rows = samples.reshape(height, -1)
    if depth == 16:
        rows = rows.astype(">u2").view(np.uint8)
    elif depth < 8:
        bits = np.unpackbits(rows.astype(np.uint8)[..., None], axis=2)[..., 8 - depth :]
        rows = np.packbits(bits.reshape(height, -1), axis=1)
    body = b"".join(b"\0" + row.tobytes() for row in rows)
    pixels = chunk(b"IDAT", zlib.compress(body))
    return b"\x89PNG\r\n\x1a\n" + head + extra + pixels + chunk(b"IEND", b"")


def bmp(rows, bits, compression=0, masks=(), header=40, palette=b"", down=False, colors=0):
    """A BMP by hand: `rows` as bytes in the order of the file."""
    height = -SIDES[0] if down else SIDES[0]
    if header == 12:
        info = struct.pack("<IHHHH", 12, SIDES[1], height, 1, bits)
    else:
        info = struct.pack(
            "<IiiHHIIiiII",
            header,
            SIDES[1],
            height,
            1,
            bits,
            compression,
            len(rows),
            0,
            0,
            colors,
            0,
        )
        told = struct.pack(f"<{len(masks)}I", *masks)
        info += told.ljust(header - 40, b"\0") if header > 40 else told
    start = 14 + len(info) + len(palette)
    return struct.pack("<2sIHHI", b"BM", start + len(rows), 0, 0, start) + info + palette + rows


def bmps():
    pixels = np.asarray(picture())[::-1]  # rows from below
    red, green, blue = (pixels[..., i : i + 1] for i in range(3))
    ramp = np.broadcast_to(np.arange(64, dtype=np.uint8)[None, :, None] * 4, red.shape)

    def joined(*layers):
        return np.concatenate(layers, -1).tobytes()

    def packed(*widths):
        scaled = (pixels.astype(int) >> (8 - np.array(widths))).astype(np.uint16)
        shifts = [widths[1] + widths[2], widths[2], 0]
        return sum(scaled[..., i] << shifts[i] for i in range(3)).astype("<u2").tobytes()

    few = picture().quantize(8)
    places = np.asarray(few)[::-1]
    table = np.array(few.getpalette()[:24], np.uint8).reshape(8, 3)[:, ::-1]
    table = np.concatenate([table, np.zeros((8, 1), np.uint8)], 1).tobytes()
    high, low = places[:, ::2], places[:, 1::2]
    yield "24", bmp(joined(blue, green, red), 24)
    yield "24 top down", bmp(joined(blue, green, red), 24, down=True)
    yield "24 of OS/2", bmp(joined(blue, green, red), 24, header=12)
    yield "32", bmp(joined(blue, green, red, ramp), 32)
    yield "32 of zeros", bmp(joined(blue, green, red, ramp * 0), 32)
    yield "32 of OS/2 2", bmp(joined(blue, green, red, ramp), 32, header=64)
    yield "16", bmp(packed(5, 5, 5), 16)
    fields = {"compression": 3}
    yield "565", bmp(packed(5, 6, 5), 16, masks=(0xF800, 0x7E0, 0x1F), **fields)
    yield "555", bmp(packed(5, 5, 5), 16, masks=(0x7C00, 0x3E0, 0x1F), **fields)
    usual = 0xFF0000, 0xFF00, 0xFF
    yield "BGRX", bmp(joined(blue, green, red, ramp), 32, masks=usual, **fields)
    yield (
        "XBGR",
        bmp(joined(ramp, blue, green, red), 32, masks=(0xFF000000, 0xFF0000, 0xFF00), **fields),
    )
    for header in (56, 108, 124):
        for name, layers, masks in (
            ("BGRA", (blue, green, red, ramp), (*usual, 0xFF000000)),
            ("RGBA", (red, green, blue, ramp), (0xFF, 0xFF00, 0xFF0000, 0xFF000000)),
            ("ABGR", (ramp, blue, green, red), (0xFF000000, 0xFF0000, 0xFF00, 0xFF)),
        ):
            yield f"{name} {header}", bmp(joined(*layers), 32, masks=masks, header=header, **fields)
    yield "8", bmp(places.tobytes(), 8, palette=table, colors=8)
    yield "8 top down", bmp(places.tobytes(), 8, palette=table, colors=8, down=True)
    yield "4", bmp((high * 16 + low).astype(np.uint8).tobytes(), 4, palette=table, colors=8)
    runs = b"".join(b"".join(bytes([1, place]) for place in row) + b"\0\0" for row in places)
    yield "RLE8", bmp(runs + b"\0\1", 8, 1, palette=table, colors=8)
    runs = b"".join(
        b"".join(bytes([2, a * 16 + b]) for a, b in zip(*row)) + b"\0\0" for row in zip(high, low)
    )
    yield "RLE4", bmp(runs + b"\0\1", 4, 2, palette=table, colors=8)
    yield "1", encoded(picture().convert("1"), "bmp")
    yield "grey", encoded(picture().convert("L"), "bmp")


def large(kind):
    """A small file whose header says 100,000 x 100,000 pixels, or as many as the format can."""
    data, most = encoded(picture(), kind), struct.pack(">HH", 65_021, 65_021)
    if kind == "png":
        head = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        return data[:8] + chunk(b"IHDR", head) + data[33:]
    if kind == "webp":
        canvas = (99_999).to_bytes(3, "little") * 2
        return data[:12] + b"VP8X" + struct.pack("<I", 10) + bytes(4) + canvas + data[12:]
    if kind == "bmp":
        return at(data, b"BM", 18, struct.pack("<II", 100_000, 100_000))
    return at(data, b"GIF", 6, most) if kind == "gif" else at(data, b"\xff\xc0", 5, most)

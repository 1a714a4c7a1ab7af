"""Decoding of every kind of file against Pillow, and what is refused before it is decoded."""

import io
import struct
import zlib

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from vlp_jax.data import faults
from vlp_jax.data.ops import apply_ops, build_ops
from vlp_jax.errors import UserError


def picture(height=48, width=64):
    corners = np.array([[[250, 10, 10], [10, 240, 10]], [[10, 10, 230], [240, 240, 20]]], np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BILINEAR)


def encoded(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoder(**arguments):
    ops = build_ops({"decode_image": arguments})
    seeds = tf.zeros([1, 2], tf.int32)
    process = tf.function(lambda e: apply_ops(ops, e, seeds), autograph=False)
    return lambda data: process({"image": tf.constant(data)})["image"].numpy()


@pytest.fixture(scope="module")
def decode():
    return decoder()


def pillow(data):
    with Image.open(io.BytesIO(data)) as image:
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(white, upright))[..., :3]


def with_alpha():
    image = picture()
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None].repeat(48, 0)
    image.putalpha(Image.fromarray(ramp))
    return image


def files():
    grey, few, red = (
        picture().convert("L"),
        picture().quantize(8),
        Image.new("RGB", (64, 48), "red"),
    )
    flat = few.convert("RGB")
    small = Image.new("P", (64, 48), 3)
    small.putpalette(few.getpalette())
    exact = {"lossless": True, "exact": True}
    animated = {"save_all": True, "append_images": [red, red]}
    yield "png grey with a transparent shade", encoded(grey, "png", transparency=100)
    key = flat.getpixel((5, 5))
    yield "png with a transparent colour", encoded(flat, "png", transparency=key)
    yield "png palette", encoded(few, "png", transparency=bytes([0, 50, 100, 150, 200]))
    yield "png 1 bit", encoded(picture().convert("1"), "png")
    yield "png palette 2 bits", encoded(picture().quantize(4), "png", bits=2)
    yield "gif", encoded(few, "gif")
    yield "gif interlaced, transparent", encoded(few, "gif", transparency=2, interlace=True)
    yield "gif animated", encoded(few, "gif", **animated)
    yield "gif animated, transparent", encoded(few, "gif", transparency=1, **animated)
    yield "webp alpha", encoded(with_alpha(), "webp", **exact)
    yield "webp lossy", encoded(picture(), "webp", quality=90)
    yield "webp animated", encoded(picture(), "webp", lossless=True, **animated)
    yield "webp animated, lossy alpha", encoded(with_alpha(), "webp", quality=80, **animated)
    yield "bmp", encoded(picture(), "bmp")
    yield "bmp palette", encoded(few, "bmp")
    yield "bmp grey", encoded(grey, "bmp")
    yield "bmp 1 bit", encoded(picture(47, 61).convert("1"), "bmp")
    yield "jpeg", encoded(picture(), "jpeg", quality=95)
    yield "jpeg grey", encoded(grey, "jpeg", quality=95)
    yield "jpeg progressive", encoded(picture(), "jpeg", quality=95, progressive=True)
    yield "jpeg cmyk", encoded(picture().convert("CMYK"), "jpeg", quality=95)


FILES = dict(files())


@pytest.mark.parametrize("name", FILES)
def test_every_kind_is_what_pillow_makes_of_it(decode, name):
    image, expected = decode(FILES[name]), pillow(FILES[name])
    assert image.shape == expected.shape and image.dtype == np.uint8
    # Pillow converts CMYK with one rounding more; lossy WebP differs in the upsampling of colour.
    tolerance = {"jpeg cmyk": 4, "webp lossy": 2, "webp animated, lossy alpha": 3}.get(name, 1)
    assert np.abs(image.astype(int) - expected).max() <= tolerance


def test_interlaced_and_deep_png(decode):
    """Written by hand: Pillow writes neither. Adam7 of one pixel, and RGB of 16 bits."""

    def png(width, height, depth, interlaced, rows):
        def chunk(kind, body):
            crc = zlib.crc32(kind + body)
            return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

        head = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, interlaced)
        body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
        return b"\x89PNG\r\n\x1a\n" + body

    # Passes 1 and 6 of Adam7 hold the columns 0 and 1 of a first row of two pixels.
    two = png(2, 1, 8, 1, b"\0\1\2\3" + b"\0\4\5\6")
    np.testing.assert_array_equal(decode(two), [[[1, 2, 3], [4, 5, 6]]])
    deep = png(1, 1, 16, 0, b"\0" + bytes([10, 200, 20, 255, 30, 0]))
    np.testing.assert_array_equal(decode(deep), [[[10, 20, 30]]])


@pytest.mark.parametrize("kind", ["png", "webp"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_exif_orientation_of_png_and_webp(decode, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(picture(), kind, exif=exif, **({"lossless": True} if kind == "webp" else {}))
    np.testing.assert_array_equal(decode(data), pillow(data))


def test_a_frame_smaller_than_its_canvas_stands_on_white(decode):
    frame = encoded(picture(10, 12), "webp", lossless=True)
    chunk = frame[12:]
    little = lambda number: number.to_bytes(3, "little")  # noqa: E731
    body = little(2) + little(3) + little(11) + little(9) + little(50) + b"\0" + chunk
    chunks = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + little(29) + little(19)
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    chunks += b"ANMF" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    expected = np.full((20, 30, 3), 255, np.uint8)
    expected[6:16, 4:16] = np.asarray(picture(10, 12))
    np.testing.assert_array_equal(decode(data), expected)


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_large_images_are_refused_by_their_header(kind):
    data = encoded(picture(), kind)
    assert decoder(max_pixels=48 * 64)(data).shape == (48, 64, 3)
    # Were anything decoded, the missing half would be what is complained about.
    half = data[: len(data) // 2] if kind != "jpeg" else data[:-40]
    with pytest.raises(tf.errors.OpError) as caught:
        decoder(max_pixels=48 * 64 - 1)(data if kind == "gif" else half)
    assert faults.explain(caught.value.message)[0] == faults.TOO_LARGE


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_half_a_file_fails(decode, kind):
    data = encoded(picture(300, 400), kind)
    for end in (len(data) // 2, len(data) // 50 + 20):
        with pytest.raises(tf.errors.OpError) as caught:
            decode(data[:end])
        assert faults.explain(caught.value.message)[0] == faults.UNDECODABLE


@pytest.mark.parametrize("data", [b"", b"a text", b"\xff\xd8\xff", b"BM", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_fails(decode, data):
    with pytest.raises(tf.errors.OpError) as caught:
        decode(data)
    reason, detail = faults.explain(caught.value.message)
    assert reason == faults.UNDECODABLE and len(detail) > 10


def test_settings():
    with pytest.raises(UserError, match="max_pixels"):
        build_ops({"decode_image": {"max_pixels": 0}})
    assert build_ops({"decode_image": {}})[0][0] == "decode_image"

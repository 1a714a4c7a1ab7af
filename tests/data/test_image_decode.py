"""Decoding of every kind of file against Pillow, and what is refused before it is decoded."""

import io
import struct
import zlib

import numpy as np
import odd_images
import pytest
import tensorflow as tf
from odd_images import encoded, picture
from PIL import Image, ImageOps, PngImagePlugin

from vlp_jax.data import faults
from vlp_jax.data.image_ops.upright import upright_rgb
from vlp_jax.data.ops import apply_ops, build_ops
from vlp_jax.data.prepare.examples import image_fault
from vlp_jax.errors import UserError


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
        image.load()
        upright = ImageOps.exif_transpose(image).convert("RGBA")
    white = Image.new("RGBA", upright.size, "white")
    return np.asarray(Image.alpha_composite(white, upright))[..., :3]


FILES = {
    **dict(odd_images.kinds()),
    **dict(odd_images.turned()),
    **{f"bmp {name}": data for name, data in odd_images.bmps()},
}
assert len(FILES) > 100


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_what_pillow_makes_of_it_in_training_and_after_load(decode, name):
    data = FILES[name]
    expected = pillow(data)
    with Image.open(io.BytesIO(data)) as opened:
        upright = upright_rgb(opened)
    np.testing.assert_array_equal(upright, expected)
    np.testing.assert_array_equal(upright_rgb(upright), expected)  # it is not turned twice
    image = decode(data)
    assert image.shape == expected.shape and image.dtype == np.uint8
    # Lossy WebP differs in the upsampling of colour.
    tolerance = {"webp lossy": 2}.get(name, 1)
    assert np.abs(image.astype(int) - expected).max() <= tolerance


def test_the_list_holds_what_its_names_say():
    """An orientation that Pillow does not see would let the test above pass without a rule."""
    sides = {name: pillow(data).shape[:2] for name, data in FILES.items()}
    lying = {"jpeg exif 6", "png exif 8", "jpeg xmp", "jpeg xmp element", "jpeg xmp behind exif"}
    lying |= {"jpeg exif behind the tables", "jpeg exif behind a large profile", "webp xmp"}
    lying |= {"png raw profile zTXt", "png xmp iTXt, compressed", "png exif behind the pixels"}
    lying |= {"jpeg cmyk exif", "png colour, exif", "webp animated, exif", "jpeg exif as a long"}
    assert {sides[name] for name in lying} == {(64, 48)}
    standing = {"jpeg exif 9", "jpeg exif as a byte", "jpeg exif of 0 against xmp", "jpeg exif 4"}
    standing |= {"png raw profile APP1", "webp exif against its flags", "jpeg exif damaged"}
    assert {sides[name] for name in standing} == {(48, 64)}


GREY2 = np.arange(12, dtype=int).reshape(3, 4, 1) % 4
GREY4 = np.arange(12, dtype=int).reshape(3, 4, 1)
DEEP = np.random.default_rng(0).integers(0, 65536, (3, 4, 4))
KEYED = DEEP[..., :1].repeat(3, -1)
KEYED[0, 0] = KEYED[1, 1] + [0, 0, 1]  # differs from the transparent colour in the lowest bit alone


def by_hand():
    """PNGs of kinds that Pillow does not write, with their pixels by the specification."""

    def key(*samples):
        return odd_images.chunk(b"tRNS", struct.pack(f">{len(samples)}H", *samples))

    deep, white = (DEEP >> 8), np.full(3, 255)
    blend = DEEP[..., :3] / 257 * DEEP[..., 3:] / 65535 + 255 - DEEP[..., 3:] / 257
    yield "RGB of 16 bits", odd_images.png(DEEP[..., :3], 2, 16), deep[..., :3]
    yield "RGBA of 16 bits", odd_images.png(DEEP, 6, 16), blend
    yield "grey and alpha of 16 bits", odd_images.png(DEEP[..., 2:], 4, 16), blend[..., 2:]
    yield "grey of 16 bits", odd_images.png(DEEP[..., :1], 0, 16), deep[..., :1]
    same = (DEEP[..., :1] == DEEP[1, 1, 0]).repeat(3, -1)
    shade = odd_images.png(DEEP[..., :1], 0, 16, key(DEEP[1, 1, 0]))
    yield "transparent grey of 16 bits", shade, np.where(same, white, deep[..., :1])
    for name, samples, depth in (("2", GREY2, 2), ("4", GREY4, 4)):
        shown = np.where(samples == 2, white, samples * 255 // (2**depth - 1))
        yield f"transparent grey of {name} bits", odd_images.png(samples, 0, depth, key(2)), shown
    color = odd_images.png(DEEP[..., :3], 2, 16, key(*DEEP[1, 1, :3]))
    hidden = (deep[..., :3] == deep[1, 1, :3]).all(-1, keepdims=True)
    yield "transparent colour of 16 bits", color, np.where(hidden, white, deep[..., :3])
    # Passes 1 and 6 of Adam7 hold the columns 0 and 1 of a first row of two pixels.
    two = odd_images.png(np.array([[[1, 2, 3]]]), 2, 8, interlaced=1)
    head = odd_images.chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 8, 2, 0, 0, 1))
    body = odd_images.chunk(b"IDAT", zlib.compress(b"\0\1\2\3" + b"\0\4\5\6"))
    two = two[:8] + head + body + odd_images.chunk(b"IEND", b"")
    yield "interlaced", two, np.array([[[1, 2, 3], [4, 5, 6]]])


@pytest.mark.parametrize(
    ("data", "expected"), [case[1:] for case in by_hand()], ids=[c[0] for c in by_hand()]
)
def test_pngs_that_pillow_does_not_write(decode, data, expected):
    expected = np.broadcast_to(expected, (*expected.shape[:2], 3))
    with Image.open(io.BytesIO(data)) as opened:
        loaded = np.asarray(upright_rgb(opened))
    for image in (loaded, decode(data)):
        # Of alpha with 16 bits the upper 8 are kept, by Pillow as well.
        assert np.abs(image - expected).max() <= 2


@pytest.mark.parametrize(("alpha", "background"), [(0x10, 255), (0, 0)])
def test_a_frame_smaller_than_its_canvas_stands_on_pillows_background(decode, alpha, background):
    """White, as all that is transparent, in a file that announces alpha; otherwise black."""
    frame = encoded(picture(10, 12), "webp", lossless=True)
    chunk = frame[12:]
    little = lambda number: number.to_bytes(3, "little")  # noqa: E731
    body = little(2) + little(3) + little(11) + little(9) + little(50) + b"\0" + chunk
    chunks = b"VP8X" + struct.pack("<I", 10) + bytes([2 | alpha, 0, 0, 0]) + little(29) + little(19)
    chunks += b"ANIM" + struct.pack("<I", 6) + bytes(6)
    chunks += b"ANMF" + struct.pack("<I", len(body)) + body + b"\0" * (len(body) % 2)
    data = b"RIFF" + struct.pack("<I", 4 + len(chunks)) + b"WEBP" + chunks
    expected = np.full((20, 30, 3), background, np.uint8)
    expected[6:16, 4:16] = np.asarray(picture(10, 12))
    np.testing.assert_array_equal(decode(data), expected)
    np.testing.assert_array_equal(pillow(data), expected)


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


def refused(decode, data):
    """The reason and the detail with which training leaves a file out."""
    with pytest.raises(tf.errors.OpError) as caught:
        decode(data)
    return faults.explain(caught.value.message)


@pytest.mark.parametrize("data", [b"", b"a text", b"\xff\xd8\xff", b"BM", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_image_fails(decode, data):
    reason, detail = refused(decode, data)
    assert reason == faults.UNDECODABLE and len(detail) > 10


FOREIGN = {
    "TIFF": encoded(picture(), "tiff"),
    "ICO": encoded(picture(), "ico"),
    "AVIF": b"\0\0\0\x20ftypavif" + bytes(50),
    "HEIC": b"\0\0\0\x18ftypheic" + bytes(50),
    "JPEG 2000": encoded(picture(), "jpeg2000"),
    "JPEG XL": b"\xff\x0a" + bytes(50),
    "SVG": b'\n<svg xmlns="http://www.w3.org/2000/svg"/>',
    "HTML": b"<!DOCTYPE html><title>Not found</title>",
    "PDF": b"%PDF-1.7 " + bytes(50),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_other_formats_are_called_by_their_name(decode, name):
    for reason, detail in (refused(decode, FOREIGN[name]), image_fault(FOREIGN[name], True)):
        assert reason == faults.UNDECODABLE
        assert f"a file of the format {name}; JPEG, PNG, WebP, GIF and BMP are decoded" in detail


def test_bmps_that_pillow_does_not_know_are_no_wrong_colors(decode):
    rows = np.asarray(picture().convert("RGBA")).tobytes()
    ten = (0x3FF00000, 0xFFC00, 0x3FF)  # 10 bits a colour
    for data in (
        odd_images.bmp(rows, 32, 3, ten),
        odd_images.bmp(rows, 32, 3, (0xFF, 0xFF00, 0xFF0000)),
        odd_images.bmp(rows[: 48 * 64 * 2], 16, 3, (0xF000, 0xF00, 0xF0)),
        odd_images.bmp(FILES["jpeg"], 24, 4),
        odd_images.bmp(FILES["png alpha"], 24, 5),
    ):
        reason, detail = refused(decode, data)
        assert reason == faults.UNDECODABLE and detail.startswith("BMP: Unsupported")


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "gif", "bmp"])
def test_a_header_that_promises_too_much(decode, kind):
    assert refused(decode, odd_images.large(kind))[0] == faults.TOO_LARGE


@pytest.mark.parametrize("kind", ["zTXt", "iTXt"])
def test_a_text_that_inflates_without_end_is_not_read(decode, kind, monkeypatch):
    inflated = zlib.compress(b"0" * 2**25, 9)  # 32 kB in the file, 32 MiB in memory
    body = {"zTXt": b"Raw profile type exif\0\0", "iTXt": b"XML:com.adobe.xmp\0\1\0\0\0"}[kind]
    data = odd_images.with_chunk(FILES["png exif 6"], kind.encode(), body + inflated)
    lengths = []
    bounded = PngImagePlugin._safe_zlib_decompress

    def noted(s):
        lengths.append(len(s))
        return bounded(s)

    monkeypatch.setattr(PngImagePlugin, "_safe_zlib_decompress", noted)
    np.testing.assert_array_equal(decode(data), np.asarray(picture()))
    assert lengths == [len(inflated)]  # Pillow's own bound was asked


def test_settings():
    with pytest.raises(UserError, match="max_pixels"):
        build_ops({"decode_image": {"max_pixels": 0}})
    assert build_ops({"decode_image": {}})[0][0] == "decode_image"

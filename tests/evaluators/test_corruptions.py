"""Corruptions against Pillow, SciPy and colorsys, and the properties of what is random."""

import colorsys
import io

import jax
import numpy as np
import pytest
import scipy.ndimage
from PIL import Image

from vlp_jax.errors import UserError
from vlp_jax.evaluators.corruptions import CORRUPTIONS, constants, corrupt, plasma

SIDE = 32


def pictures(count=6, side=SIDE, seed=0):
    """Smooth color pictures with an edge and a little noise, uint8."""
    rng = np.random.default_rng(seed)
    coarse = rng.uniform(0, 255, (count, 5, 5, 3))
    smooth = scipy.ndimage.zoom(coarse, (1, side / 5, side / 5, 1), order=1)
    smooth[:, : side // 2, side // 3 :] *= 0.6
    return np.clip(smooth + rng.normal(0, 3, smooth.shape), 0, 255).astype(np.uint8)


def corrupted(images, name, severity, seed=0, first=0):
    return np.asarray(corrupt(images, np.arange(first, first + len(images)), name, severity, seed))


def differences(one, other):
    return np.abs(one.astype(float) - other.astype(float))


def as_jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


@pytest.mark.parametrize("severity", [1, 5])
def test_jpeg_is_that_of_libjpeg(severity):
    quality, images = constants.SMALL["jpeg_compression"][severity - 1], pictures()
    grey = np.repeat(images[..., :1], 3, axis=-1)
    # A coefficient half-way between two steps may be rounded the other way, which changes a block.
    expected = np.stack([as_jpeg(image, quality) for image in grey])
    error = differences(corrupted(grey, "jpeg_compression", severity), expected)
    assert (error <= 1).mean() > 0.95 and error.max() <= 8
    # libjpeg computes color with whole numbers, so that this happens more often.
    expected = np.stack([as_jpeg(image, quality) for image in images])
    found = corrupted(images, "jpeg_compression", severity)
    assert (differences(found, expected) <= 1).mean() > 0.8
    assert differences(images, expected).mean() > 5 * differences(found, expected).mean()


def test_jpeg_of_a_size_that_blocks_do_not_divide():
    images = pictures(2, 27)[:, :, :21]
    found = corrupted(images, "jpeg_compression", 5)
    assert found.shape == images.shape
    assert differences(found[0], as_jpeg(images[0], 25)).mean() < 1


@pytest.mark.parametrize("severity", [1, 2, 5])
def test_pixelate_is_pillows_box_filter(severity):
    images = pictures()
    small = int(SIDE * constants.SMALL["pixelate"][severity - 1])
    found = corrupted(images, "pixelate", severity)
    for image, own in zip(images, found, strict=True):
        twice = Image.fromarray(image).resize((small, small), Image.BOX).resize((SIDE, SIDE), 4)
        assert Image.BOX == 4
        assert differences(own, np.asarray(twice)).max() <= 1


def test_zoom_blur_is_the_mean_of_scipys_zooms():
    image = pictures(1)[0].astype(np.float64)
    end, step = constants.SMALL["zoom_blur"][4]
    total = image.copy()
    factors = np.arange(1, end, step)
    for factor in factors:
        kept = int(np.ceil(SIDE / factor))
        top = (SIDE - kept) // 2
        middle = image[top : top + kept, top : top + kept]
        zoomed = scipy.ndimage.zoom(middle, (factor, factor, 1), order=1)
        cut = (zoomed.shape[0] - SIDE) // 2
        total += zoomed[cut : cut + SIDE, cut : cut + SIDE]
    expected = total / (len(factors) + 1)
    assert (
        differences(corrupted(image[None].astype(np.uint8), "zoom_blur", 5)[0], expected).max() < 1
    )


@pytest.mark.parametrize("severity", [1, 5])
def test_defocus_blur_is_a_correlation_with_a_disk(severity):
    image = pictures(1)[0]
    radius, blur = constants.SMALL["defocus_blur"][severity - 1]
    place = np.arange(-8, 9)
    flat = (place**2 + place[:, None] ** 2 <= radius**2).astype(float)
    kernel = scipy.ndimage.gaussian_filter(flat / flat.sum(), blur, radius=1, mode="mirror")
    expected = scipy.ndimage.correlate(image.astype(float), kernel[..., None], mode="mirror")
    assert differences(corrupted(image[None], "defocus_blur", severity)[0], expected).max() <= 0.51


def test_brightness_is_that_of_hsv():
    image = pictures(1, 8)[0]
    image[0, 0] = 0
    found = corrupted(image[None], "brightness", 3)[0] / 255
    for y in range(8):
        for x in range(8):
            hue, saturation, value = colorsys.rgb_to_hsv(*(image[y, x] / 255))
            expected = colorsys.hsv_to_rgb(hue, saturation, min(value + 0.3, 1))
            np.testing.assert_allclose(found[y, x], expected, atol=0.51 / 255)


def test_contrast_by_hand():
    image = pictures(1)[0] / 255
    mean = image.mean(axis=(0, 1))
    expected = ((image - mean) * 0.2 + mean) * 255
    found = corrupted((image * 255).round().astype(np.uint8)[None], "contrast", 3)[0]
    assert differences(found, expected).max() <= 0.6


def test_noise_has_the_moments_that_it_should():
    grey = np.full((4, 64, 64, 3), 128, np.uint8)
    found = corrupted(grey, "gaussian_noise", 3) / 255.0
    assert found.std() == pytest.approx(0.12, rel=0.03)
    assert found.mean() == pytest.approx(128 / 255, abs=0.003)
    found = corrupted(grey, "shot_noise", 2) / 255.0  # variance: value / photons
    assert found.std() == pytest.approx(np.sqrt(128 / 255 / 100), rel=0.03)
    assert found.mean() == pytest.approx(128 / 255, abs=0.003)
    found = corrupted(grey, "impulse_noise", 5)
    assert set(np.unique(found)) == {0, 128, 255}
    assert (found != 128).mean() == pytest.approx(0.14, rel=0.1)
    assert (found == 255).sum() == pytest.approx((found == 0).sum(), rel=0.1)


def test_motion_blur_spreads_a_point_along_a_line_by_half_a_bell():
    points = np.zeros((8, 33, 33, 3), np.uint8)
    points[:, 16, 16] = 255
    found = corrupted(points, "motion_blur", 5)[..., 0].astype(float)
    place = np.arange(25)
    bell = np.exp(-(place**2) / (2 * 3.0**2))
    bell /= bell.sum()
    directions = set()
    for image in found:
        assert image[16, 16] == pytest.approx(255 * bell[0], abs=0.51)
        # Offsets to the right become places to the left of the point, at most 45 degrees off.
        assert image[:, 17:].sum() == 0
        rows, columns = np.nonzero(image)
        assert (np.abs(rows - 16) <= 16 - columns + 1).all()
        np.testing.assert_allclose(image.sum(), 255, atol=8)
        directions.add(int(rows[columns.argmin()]) - 16)
    assert len(directions) > 3


def test_fog_brightens_what_is_dark_and_keeps_the_range():
    images = (pictures() * 0.4).astype(np.uint8)
    means = [corrupted(images, "fog", s).mean() for s in (1, 5)]
    assert images.mean() < means[0] and (corrupted(images, "fog", 5).max((1, 2, 3)) <= 102).all()
    cloud_of = jax.jit(plasma, static_argnums=1)
    clouds = [np.asarray(cloud_of(jax.random.key(0), 64, d)) for d in (1.2, 3.0)]
    for cloud in clouds:
        assert cloud.min() == 0 and cloud.max() == pytest.approx(1)
    roughness = [np.abs(np.diff(cloud, 2, axis=0)).mean() for cloud in clouds]
    assert roughness[1] < roughness[0] / 2


SLOW = {"fog", "shot_noise"}  # to compile


@pytest.mark.parametrize(
    "name", [pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in CORRUPTIONS]
)
def test_severities_get_worse_and_batches_do_not_matter(name):
    images = pictures(6)
    distance = [differences(corrupted(images, name, s), images).mean() for s in (1, 3, 5)]
    assert 0 < distance[0] < distance[1] < distance[2]
    whole = corrupted(images, name, 3)
    np.testing.assert_array_equal(whole[4:], corrupted(images[4:], name, 3, first=4))
    assert whole.dtype == np.uint8


def test_what_is_random_depends_on_seed_and_image():
    same = np.repeat(pictures(1), 2, axis=0)
    one = corrupted(same, "gaussian_noise", 1)
    assert (one[0] != one[1]).any()
    assert (corrupted(same, "gaussian_noise", 1, seed=1) != one).any()
    assert (corrupted(same, "gaussian_noise", 1) == one).all()


def test_large_images_have_the_other_constants():
    large = np.full((1, 128, 130, 3), 128, np.uint8)
    assert (corrupted(large, "gaussian_noise", 1) / 255).std() == pytest.approx(0.08, rel=0.03)
    assert (corrupted(large[:, :127], "gaussian_noise", 1) / 255).std() == pytest.approx(
        0.04, rel=0.03
    )
    assert set(constants.SMALL) == set(constants.LARGE) == set(CORRUPTIONS)


@pytest.mark.parametrize(
    ("name", "severity", "message"),
    [("gausian_noise", 1, "did you mean 'gaussian_noise'"), ("fog", 6, "1 to 5"), ("fog", 0, "1")],
)
def test_mistakes(name, severity, message):
    with pytest.raises(UserError, match=message):
        corrupted(pictures(1), name, severity)

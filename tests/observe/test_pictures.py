"""The pictures, by what can be seen in them: which color is where."""

import numpy as np
import pytest
from PIL import Image

from vlp_jax.observe.palette import PALE, SERIES
from vlp_jax.observe.pictures import (
    VIEWS,
    draw_comparison,
    draw_differences,
    draw_reconstructions,
)

TITLES = {"title": "A title", "subtitle": "what it is about"}


def pixels(path):
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB")).astype(int)


def where(picture, color):
    """(rows, columns) of the pixels of a color, [r, g, b] or "#rrggbb"."""
    if isinstance(color, str):
        color = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return np.nonzero(np.abs(picture - color).max(axis=-1) <= 2)


def center(picture, color):
    rows, columns = where(picture, color)
    assert len(rows) > 50, f"{color} is not there"
    return rows.mean(), columns.mean()


def colors(count):
    """An own color for every view of every image, none of them grey."""
    index = np.arange(count * len(VIEWS))
    rgb = np.stack([20 + 10 * index % 200, 230 - 5 * index, 40 + 7 * index % 180], axis=-1)
    return rgb.reshape(count, len(VIEWS), 3)


def paint(path, rgb):
    views = np.broadcast_to(rgb[:, :, None, None] / 255.0, (*rgb.shape[:2], 8, 8, 3))
    draw_reconstructions(path, views.astype(np.float32), **TITLES)
    return pixels(path)


def test_views_stand_side_by_side_and_images_in_rows(tmp_path):
    rgb = colors(6)
    picture = paint(tmp_path / "made" / "views.png", rgb)
    centers = np.array([[center(picture, color) for color in image] for image in rgb])
    rows, columns = centers[..., 0], centers[..., 1]
    assert np.ptp(rows[:4]) < 2 and np.ptp(rows[4:]) < 2 and rows[4, 0] > rows[0, 0] + 20
    assert (np.diff(columns[:4].ravel()) > 20).all() and (np.diff(columns[4:].ravel()) > 20).all()
    np.testing.assert_allclose(columns[4:], columns[:2], atol=2)
    sizes = [len(where(picture, color)[0]) for color in rgb.reshape(-1, 3)]
    assert max(sizes) < 1.1 * min(sizes)


def test_an_image_is_drawn_upright_and_as_it_is(tmp_path):
    views = np.full((1, 3, 8, 8, 3), 0.5, np.float32)
    red, blue = (200, 0, 0), (0, 0, 200)
    views[0, 1, :4], views[0, 1, 4:] = np.array(red) / 255, np.array(blue) / 255
    views[0, 2] = (-3, 7, -3)  # out of range: as near as can be shown
    draw_reconstructions(tmp_path / "views.png", views, **TITLES)
    picture = pixels(tmp_path / "views.png")
    (top, left), (bottom, right) = center(picture, red), center(picture, blue)
    assert bottom > top + 20 and abs(left - right) < 2
    assert center(picture, (0, 255, 0))[1] > left + 50


@pytest.mark.parametrize("shape", [(0, 3, 8, 8, 3), (2, 2, 8, 8, 3), (3, 8, 8, 3)])
def test_views_that_are_not_three_of_an_image_are_refused(tmp_path, shape):
    with pytest.raises(ValueError, match="three views"):
        draw_reconstructions(tmp_path / "views.png", np.zeros(shape), **TITLES)
    assert not (tmp_path / "views.png").exists()


def compare(path, curves, **more):
    draw_comparison(path, curves, **TITLES, ylabel="accuracy", **more)
    return pixels(path)


def test_curves_have_their_colors_and_their_heights(tmp_path):
    steps = [0, 50, 100]
    curves = {"low": (steps, [0.1, 0.2, 0.2]), "high": (steps, [0.5, 0.9, 0.95])}
    picture = compare(tmp_path / "a.png", curves)
    assert center(picture, SERIES[1])[0] < center(picture, SERIES[0])[0] - 50
    swapped = compare(tmp_path / "b.png", {"low": curves["high"], "high": curves["low"]})
    assert center(swapped, SERIES[1])[0] > center(swapped, SERIES[0])[0] + 50
    one = compare(tmp_path / "c.png", {"low": curves["low"]})
    assert not len(where(one, SERIES[1])[0])


def test_the_target_is_a_dotted_line_at_its_height(tmp_path):
    curves = {"run": ([0, 100], [0.0, 0.0])}
    without = compare(tmp_path / "without.png", curves)
    heights = []
    for target in (0.3, 0.9):
        picture = compare(tmp_path / "with.png", curves, target=target)
        rows, columns = np.nonzero((picture != without).any(axis=-1))
        line = np.ptp(columns[rows < rows.min() + 6])  # the label stands below its beginning
        assert line > 500 and np.ptp(rows) < 40
        named = compare(tmp_path / "named.png", curves, target=target, target_label="the aim")
        assert (named != picture).any()
        assert len(where(picture, PALE)[0]) > len(where(without, PALE)[0])
        heights.append(rows.mean())
    assert heights[1] < heights[0] - 200


def test_there_is_something_to_compare(tmp_path):
    with pytest.raises(ValueError, match="no curve"):
        compare(tmp_path / "x.png", {})


def differences(path, curves):
    draw_differences(path, curves, baseline="a", ylabel="loss", **TITLES)
    return pixels(path)


def test_differences_are_of_variants_with_the_steps_of_the_baseline(tmp_path):
    steps, loss = [0, 10, 20], np.array([3.0, 2.0, 1.0])
    curves = {"a": [(steps, loss), (steps, loss + 0.1)]}
    curves["b"] = [(steps, loss + 0.5), (steps, loss + 0.7)]
    curves["long"] = [([0, 20, 40], loss), ([0, 20, 40], loss - 0.2)]
    picture = differences(tmp_path / "x.png", curves)
    middle = picture.shape[1] // 2
    sides = [{x > middle for x in where(picture, SERIES[n])[1].tolist()} for n in range(3)]
    assert sides == [{False}, {False, True}, {False}]
    for wrong in ([(steps, loss)], [(steps, loss), ([0, 10, 30], loss)]):
        with pytest.raises(ValueError, match="numbers of runs differ, or the steps"):
            differences(tmp_path / "y.png", {**curves, "b": wrong})


def test_there_are_as_many_curves_as_variants(tmp_path):
    curves = {f"{n}": ([0, 100], [0.1 * n, 0.1 * n]) for n in range(1, 9)}
    before = compare(tmp_path / "7.png", dict(list(curves.items())[:7]))
    after = compare(tmp_path / "8.png", curves)
    color = SERIES[7 - len(SERIES)]
    assert len(where(after, color)[0]) > len(where(before, color)[0]) + 500

"""The pictures, by what can be seen in them: which color is where."""

import numpy as np
import pytest
from PIL import Image

from vlp_jax.observe.palette import SERIES
from vlp_jax.observe.pictures import draw_differences

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
    curves = {name: [([0, 100], np.full(2, 0.1 * n))] for n, name in enumerate("abcdefgh", 1)}
    before = differences(tmp_path / "7.png", dict(list(curves.items())[:7]))
    after = differences(tmp_path / "8.png", curves)
    color = SERIES[7 - len(SERIES)]
    assert len(where(after, color)[0]) > len(where(before, color)[0]) + 500

"""The pictures: sizes that follow what is drawn, peaks where they are, text that is there."""

import numpy as np
import pytest
from PIL import Image

from vlp_jax.inspection import pictures

TITLES = dict(title="A title", subtitle="what it is of")
IMAGE = np.full((32, 32, 3), 128, np.uint8)
ORANGE = np.array([0xD5, 0x5E, 0x00])  # the cross


def read(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def crosses(path):
    """Middle of what has the color of the cross: across and down, in pixels; None if nothing."""
    found = np.argwhere(np.abs(read(path) - ORANGE).max(axis=-1) < 12)
    return found.mean(axis=0) if len(found) else None


def test_heat_maps_have_a_cross_at_the_peak(tmp_path):
    places, flat = [], np.zeros((32, 32), np.float32)
    for number, (y, x) in enumerate(((4, 4), (4, 28), (28, 4))):
        heat = flat.copy()
        heat[y, x] = 1
        path = tmp_path / f"{number}.png"
        pictures.draw_heat_maps(path, IMAGE, [heat], ["“$x_1$ & a ring”"], **TITLES)
        places.append(crosses(path))
    side = 1.5 * 200 / 32  # pixels of the picture in one of the image
    np.testing.assert_allclose(places[1] - places[0], [0, 24 * side], atol=3)
    np.testing.assert_allclose(places[2] - places[0], [24 * side, 0], atol=3)
    wide = tmp_path / "wide.png"
    pictures.draw_heat_maps(wide, IMAGE, [flat] * 6, list("abcdef"), **TITLES)
    assert len(read(wide)) > 1.5 * len(read(path))  # a second row
    with pytest.raises(ValueError, match="1 maps and 2 captions"):
        pictures.draw_heat_maps(path, IMAGE, [flat], ["a", "b"], **TITLES)


def test_attention_has_a_row_for_each_layer(tmp_path):
    maps, heights = np.random.default_rng(0).random((3, 2, 4, 4)), []
    for layers in (1, 2, 3):
        path = tmp_path / f"{layers}.png"
        pictures.draw_attention(path, IMAGE, maps[:layers], **TITLES)
        heights.append(len(read(path)))
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=2)
    with pytest.raises(ValueError, match="maps are"):
        pictures.draw_attention(path, IMAGE, maps[0], **TITLES)


def test_bars_of_tokens_are_as_long_as_their_scores(tmp_path):
    path = tmp_path / "relevance.png"
    words, scores = ["a", "<b>", "$c"], np.array([1.0, 2.0, 4.0])
    heat = np.random.default_rng(0).random((4, 4))
    pictures.draw_relevance(path, IMAGE, heat, words, scores, **TITLES)
    blue = (np.abs(read(path) - [0x0B, 0x5F, 0xA5]).max(axis=-1) < 12)[:, 900:]
    lengths = [n for n in blue.sum(axis=1) if n > 5]
    assert sorted(set(np.round(np.array(lengths) / min(lengths)).astype(int))) == [1, 2, 4]
    nothing = tmp_path / "nothing.png"
    pictures.draw_relevance(nothing, IMAGE, 0 * heat, words, 0 * scores, **TITLES)
    assert nothing.exists()
    with pytest.raises(ValueError, match="3 words and 2 scores"):
        pictures.draw_relevance(path, IMAGE, heat, words, scores[:2], **TITLES)


def test_neighbours_are_beside_their_query(tmp_path):
    path = tmp_path / "neighbours.png"
    red, green = IMAGE.copy(), IMAGE.copy()
    red[:], green[:] = (250, 10, 10), (10, 250, 10)
    names = [["0.9 a", "0.8 b"], ["0.7 c", "0.6 d"]]
    pictures.draw_neighbours(path, [IMAGE, "a long text"], [[red, green]] * 2, names, **TITLES)
    got = read(path)
    columns = [
        np.argwhere(np.abs(got - color).max(axis=-1) < 5)[:, 1].mean()
        for color in (IMAGE[0, 0], (250, 10, 10), (10, 250, 10))
    ]
    assert columns == sorted(columns)
    with pytest.raises(ValueError, match="1 queries and 2 rows"):
        pictures.draw_neighbours(path, ["a"], [[red]] * 2, names, **TITLES)


def test_small_groups_are_drawn_as_one(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(pictures.Sheet, "save", lambda sheet, path: figures.append(sheet.figure))
    groups = [f"g{i:02}" for i in range(15) for _ in range(i + 1)]
    points = np.random.default_rng(0).normal(size=(len(groups), 2))
    pictures.draw_projection("x.png", points, groups, **TITLES)
    pictures.draw_projection("x.png", points[:6], groups[:6], colors={"g02": "#123456"}, **TITLES)
    shown = [
        [text.get_text() for text in figure.axes[0].get_legend().get_texts()] for figure in figures
    ]
    assert shown[0] == [*(f"g{i:02} ({i + 1})" for i in range(4, 15)), "others (10)"]
    assert shown[1] == ["g00 (1)", "g01 (2)", "g02 (3)"]
    drawn = [collection.get_offsets() for collection in figures[0].axes[0].collections]
    assert sum(map(len, drawn)) == len(points)
    with pytest.raises(ValueError, match="2 points and 1 groups"):
        pictures.draw_projection("x.png", points[:2], groups[:1], **TITLES)

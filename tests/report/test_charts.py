"""Drawings say what the data says: places, lengths, counts; and text in them is text."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure

from vlp_jax.observe.charts import Series, short, thinned
from vlp_jax.observe.palette import DARK, LIGHT
from vlp_jax.report import charts
from vlp_jax.report.charts import figure_svg, line_chart
from vlp_jax.report.pictures import Album


def elements(svg, tag):
    return list(ET.fromstring(str(svg)).iter(tag))


def curves(svg):
    """(class, places [points, 2]) of each curve; dotted levels and axes are none."""
    for path in elements(svg, "path"):
        if path.get("fill") == "none" and path.get("stroke-width") == "2":
            yield path.get("class"), places(path)


def places(path):
    """The points of a path, in units of the drawing."""
    numbers = re.findall(r"-?[\d.]+", path.get("d"))
    return np.array(numbers, float).reshape(-1, 2)


def told(svg):
    """(text, shape) of everything that says something to a pointer."""
    return [
        (shape.find("title").text, shape)
        for shape in ET.fromstring(str(svg)).iter()
        if shape.find("title") is not None
    ]


def contrast(one, other):
    """Contrast ratio of two colors "#rrggbb", in [1, 21] (WCAG 2.1, definition)."""
    lighter, darker = sorted((luminance(one), luminance(other)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color):
    channels = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels)
    return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_contrast_is_that_of_wcag():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.005)  # WebAIM's example
    assert contrast("#ffffff", "#ff0000") == pytest.approx(3.998, abs=0.005)


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_text_of_every_color_can_be_read(palette):
    assert set(palette) == set(LIGHT)
    text = [name for name in palette if name not in ("ground", "panel", "line")]
    low = [
        (name, ground)
        for name in text
        for ground in ("ground", "panel")
        if contrast(palette[name], palette[ground]) < 4.5
    ]
    assert not low


def test_logarithmic_scale():
    """Two curves of the same ratios are equally high, and ticks are powers of ten."""
    low, high = [0.01, 0.1, 1.0], [0.1, 1.0, 10.0]
    svg = line_chart([Series("", range(3), low), Series("", range(3), high)], "x", log=True)
    (_, first), (_, second) = curves(svg)
    np.testing.assert_allclose(np.diff(first[:, 1]), np.diff(second[:, 1]), atol=0.03)
    np.testing.assert_allclose(first[1:, 1], second[:-1, 1], atol=0.03)
    ticks = [t.text for t in elements(svg, "text")]
    assert {"0.01", "0.1", "1", "10"} <= set(ticks)
    narrow = line_chart([Series("", range(3), [1.0, 2.0, 3.0])], "x", log=True)
    ((_, line),) = curves(narrow)
    np.testing.assert_allclose(*np.diff(line[:, 1]), atol=0.03)


def test_ticks_are_short():
    assert [short(v) for v in (0.0005, 0.00002, 0.25, 1000, 2500000.0)] == [
        *("5e-4", "2e-5", "0.25", "1k", "2.5M")
    ]


def test_thinned_keeps_the_ends_and_every_spike():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[31_337], values[70_000], values[5] = 50, -50, np.nan
    x, y = thinned(np.arange(100_000), values)
    assert len(x) <= 300 and (np.diff(x) > 0).all()
    assert x[0] == 0 and x[-1] == 99_999 and y.max() == 50 and y.min() == -50
    np.testing.assert_array_equal(values[x.astype(int)], y)
    few, same = thinned([1, 2, 3], [4, float("inf"), 6])
    assert few.tolist() == [1, 3] and same.tolist() == [4, 6]


def test_a_curve_lies_where_its_values_are():
    steps, values = [0, 50, 100], [0.0, 0.5, 1.0]
    svg = line_chart([Series("a <b> & c", steps, values, level=0.5)], "accuracy", share=True)
    ((look, points),) = curves(svg)
    # Halfway in both directions, and later to the right, higher further up.
    np.testing.assert_allclose(points[1], points[[0, 2]].mean(axis=0), atol=0.11)
    assert points[2, 0] > points[0, 0] and points[2, 1] < points[0, 1]
    (level,) = (p for p in elements(svg, "path") if p.get("stroke-dasharray"))
    np.testing.assert_allclose(places(level)[:, 1], points[1, 1], atol=0.11)
    assert look == level.get("class") == "s-0"
    assert [t.text for t in elements(svg, "text")][-1] == "a <b> & c"
    assert "a <b> & c from 0.0" in ET.fromstring(str(svg)).get("aria-label")
    text, marker = told(svg)[1]
    assert text == "a <b> & c step 50: 50.0\N{NO-BREAK SPACE}%"
    np.testing.assert_allclose([float(marker.get(k)) for k in "xy"], points[1], atol=0.11)


def test_names_of_curves_do_not_cover_each_other():
    six = [Series(f"curve {n}", [0, 1], [0.5, 0.9 + n / 1000]) for n in range(6)]
    svg = line_chart(six, "x", share=True)
    names = [t for t in elements(svg, "text") if t.get("font-weight")]
    heights = sorted(float(t.get("y")) for t in names)
    assert len(heights) == 6 and min(np.diff(heights)) >= 12.9
    assert heights[0] > 0 and heights[-1] <= charts.HEIGHT
    assert all(float(t.get("x")) < charts.WIDTH for t in names)
    assert [t.get("class") for t in names] == [f"f-{n}" for n in range(6)]
    lines = [p for p in elements(svg, "path") if p.get("stroke-width") == "2"]
    assert len({line.get("stroke-dasharray") for line in lines}) == 6


def test_nothing_to_draw():
    assert line_chart([Series("a", [], []), Series("b", [1], [float("nan")])], "x") is None


def test_one_point_and_a_flat_curve():
    for values in ([3.0], [3.0, 3.0], [0.0, 0.0]):
        svg = line_chart([Series("", range(len(values)), values)], "x")
        assert "nan" not in str(svg) and "inf" not in str(svg)
        assert len(told(svg)) == len(values)


def test_bars_are_as_long_as_their_values():
    svg = charts.bars({"a": 4.0, "b": 1.0, "c": 0.0}, {"a": "4", "b": "1", "c": "0"}, "x")
    shapes = [p for p in elements(svg, "path") if p.get("class") == "f-accent"]
    lengths = [np.ptp(places(p)[:, 0]) for p in shapes]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-2) and lengths[2] == 0
    assert [t.text for t in elements(svg, "text")] == ["a", "b", "c", "4", "1", "0"]


def test_a_histogram_counts():
    rng = np.random.default_rng(0)
    values = rng.poisson(30, 5000)
    svg = charts.histogram(values, "x", "tokens", (77, "context 77"))
    shapes = {
        text.split(" tokens: ")[0]: (
            int(text.split(": ")[1].replace(",", "")),
            np.ptp(places(p), 0),
        )
        for text, p in told(svg)
    }
    assert sum(count for count, _ in shapes.values()) == 5000
    first, _, last = next(iter(shapes)).partition(" to ")
    inside = (values >= int(first)) & (values <= int(last or first))
    assert shapes[next(iter(shapes))][0] == inside.sum()
    counts, heights = zip(*((count, size[1]) for count, size in shapes.values()))
    np.testing.assert_allclose(heights, np.array(counts) * max(heights) / max(counts), atol=0.05)
    assert any(t.text == "context 77" for t in elements(svg, "text"))


def test_a_few_values_far_beyond_share_the_last_bin():
    values = np.array([*range(100)] * 10 + [90_000])
    found = [text for text, _ in told(charts.histogram(values, "x", "tokens"))]
    assert sum(int(text.split(": ")[1].replace(",", "")) for text in found) == 1001
    assert "and more tokens: " in found[-1] and len(found) <= 40


def test_text_in_a_drawing_is_text():
    figure = Figure((1, 1), dpi=72)
    figure.text(0, 0, "<script>alert(1)</script>", parse_math=False)
    (line,) = figure.add_axes((0, 0, 1, 1)).plot([0, 1], [0, 1], linewidth=2)
    line.set_gid("title:</title><script>x</script>")
    markup = str(figure_svg(figure, 'a "label" <b>'))
    assert "<script" not in markup and "style=" not in markup and "<style" not in markup
    assert "<script>alert(1)</script>" in [t.text for t in elements(markup, "text")]
    assert [text for text, _ in told(markup)] == ["</title><script>x</script>"]


def test_an_album_keeps_to_its_budget():
    rng = np.random.default_rng(0)
    album = Album(150_000)
    made = [album.add(rng.integers(0, 256, (300, 200, 3), np.uint8), "noise") for _ in range(20)]
    kept = [picture for picture in made if picture is not None]
    assert 0 < len(kept) < 20 and album.left_out == 20 - len(kept)
    assert sum(len(picture.uri) for picture in kept) <= 150_000
    assert (kept[0].width, kept[0].height) == (149, 224)

"""Drawings say what the data says: places, lengths, counts; and text in them is text."""

import xml.etree.ElementTree as ET

import numpy as np
import pytest

from vlp_jax.report import line_charts, shape_charts
from vlp_jax.report.axes import MOST_POINTS, fit, nice_ticks, thinned
from vlp_jax.report.line_charts import Series, line_chart
from vlp_jax.report.palette import DARK, LIGHT, contrast
from vlp_jax.report.pictures import Album
from vlp_jax.report.svg import Drawing
from vlp_jax.report.wording import short


def elements(svg, tag):
    return list(ET.fromstring(str(svg)).iter(tag))


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


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 17), (0.00011, 0.0009), (1e6, 5e7)])
def test_ticks_are_round_inside_and_even(low, high):
    ticks = nice_ticks(low, high)
    assert 2 <= len(ticks) <= 9 and low <= ticks[0] and ticks[-1] <= high
    steps = np.diff(ticks)
    np.testing.assert_allclose(steps, steps[0], rtol=1e-6)
    digit = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
    assert min(abs(digit - d) for d in (1, 2, 5, 10)) < 1e-6


def test_logarithmic_scale():
    scale = fit([0.01, 10.0], 100, 0, log=True)
    assert scale.log and scale(scale.low) == 100 and scale(scale.high) == 0
    assert scale.ticks(9) == pytest.approx([0.01, 0.1, 1, 10])
    middle = scale((scale.low * scale.high) ** 0.5)
    assert middle == pytest.approx(50)


def test_ticks_are_short():
    assert [short(v) for v in (0.0005, 0.00002, 0.25, 1000, 2500000.0)] == [
        *("5e-4", "2e-5", "0.25", "1k", "2.5M")
    ]


def test_thinned_keeps_the_ends_and_every_spike():
    rng = np.random.default_rng(0)
    values = rng.normal(size=100_000)
    values[31_337], values[70_000], values[5] = 50, -50, np.nan
    x, y = thinned(np.arange(100_000), values)
    assert len(x) <= MOST_POINTS and (np.diff(x) > 0).all()
    assert x[0] == 0 and x[-1] == 99_999 and y.max() == 50 and y.min() == -50
    np.testing.assert_array_equal(values[x.astype(int)], y)
    few, same = thinned([1, 2, 3], [4, float("inf"), 6])
    assert few.tolist() == [1, 3] and same.tolist() == [4, 6]


def test_a_curve_lies_where_its_values_are():
    steps, values = [0, 50, 100], [0.0, 0.5, 1.0]
    svg = line_chart([Series("a <b> & c", steps, values, level=0.5)], "accuracy", share=True)
    (line,) = elements(svg, "polyline")
    points = np.array([p.split(",") for p in line.get("points").split()], float)
    # Halfway in both directions, and later to the right, higher further up.
    np.testing.assert_allclose(points[1], points[[0, 2]].mean(axis=0), atol=0.11)
    assert points[2, 0] > points[0, 0] and points[2, 1] < points[0, 1]
    (level,) = (e for e in elements(svg, "line") if "dotted" in e.get("class"))
    assert float(level.get("y1")) == pytest.approx(points[1, 1], abs=0.11)
    assert [t.text for t in elements(svg, "text")][-1] == "a <b> & c"
    assert "a <b> & c from 0.0" in ET.fromstring(str(svg)).get("aria-label")
    titles = [t.text for t in elements(svg, "title")]
    assert titles[1] == "a <b> & c step 50: 50.0\N{NO-BREAK SPACE}%"


def test_names_of_curves_do_not_cover_each_other():
    curves = [Series(f"curve {n}", [0, 1], [0.5, 0.9 + n / 1000]) for n in range(6)]
    svg = line_chart(curves, "x", share=True)
    names = [t for t in elements(svg, "text") if "strong" in t.get("class")]
    places = sorted(float(t.get("y")) for t in names)
    assert len(places) == 6 and min(np.diff(places)) >= 12.9
    assert places[0] > 0 and places[-1] <= line_charts.HEIGHT
    assert all(float(t.get("x")) < line_charts.WIDTH for t in names)
    dashes = {line.get("stroke-dasharray") for line in elements(svg, "polyline")}
    assert len(dashes) == 6


def test_nothing_to_draw():
    assert line_chart([Series("a", [], []), Series("b", [1], [float("nan")])], "x") is None


def test_one_point_and_a_flat_curve():
    for values in ([3.0], [3.0, 3.0], [0.0, 0.0]):
        svg = line_chart([Series("", range(len(values)), values)], "x")
        assert "nan" not in str(svg) and "inf" not in str(svg)


def test_bars_are_as_long_as_their_values():
    svg = shape_charts.bars({"a": 4.0, "b": 1.0, "c": 0.0}, {"a": "4", "b": "1", "c": "0"}, "x")
    lengths = [float(r.get("width")) for r in elements(svg, "rect")]
    assert lengths[0] == pytest.approx(4 * lengths[1], rel=1e-2) and lengths[2] == 1


def test_a_histogram_counts():
    rng = np.random.default_rng(0)
    values = rng.poisson(30, 5000)
    svg = shape_charts.histogram(values, "x", "tokens", (77, "context 77"))
    found = [t.text for t in elements(svg, "title")]
    counts = {
        text.split(" tokens: ")[0]: int(text.split(": ")[1].replace(",", "")) for text in found
    }
    assert sum(counts.values()) == 5000
    first, _, last = next(iter(counts)).partition(" to ")
    inside = (values >= int(first)) & (values <= int(last or first))
    assert counts[next(iter(counts))] == inside.sum()
    assert any(t.text == "context 77" for t in elements(svg, "text"))


def test_text_in_a_drawing_is_text():
    drawing = Drawing(10, 10, 'a "label" <b>')
    drawing.add("rect", title="</title><script>x</script>", x=1.0)
    drawing.text(0, 0, "<script>alert(1)</script>")
    markup = str(drawing.markup())
    assert "<script" not in markup
    assert elements(markup, "text")[0].text == "<script>alert(1)</script>"


def test_an_album_keeps_to_its_budget():
    rng = np.random.default_rng(0)
    album = Album(150_000)
    made = [album.add(rng.integers(0, 256, (300, 200, 3), np.uint8), "noise") for _ in range(20)]
    kept = [picture for picture in made if picture is not None]
    assert 0 < len(kept) < 20 and album.left_out == 20 - len(kept)
    assert sum(len(picture.uri) for picture in kept) <= 150_000
    assert (kept[0].width, kept[0].height) == (149, 224)

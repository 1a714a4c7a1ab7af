import io

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.text import Text
from PIL import Image

from vlp_jax.observe.plots import CORRECT, WRONG, report_sheet
from vlp_jax.observe.sheet import ELLIPSIS, Colored, TextFitter

_SHORT = "a red circle above a blue square"
_LONG = (
    "a large shiny red metal sphere that stands behind a small rough green rubber cube which is "
    "to the left of a tiny yellow cylinder near the back wall"
)


def _arguments(count=12, captions=(_SHORT, "a green circle"), correct=None, seed=0):
    rng = np.random.default_rng(seed)
    steps = np.arange(0, 600, 2)
    true = [captions[i % len(captions)] for i in range(count)]
    return dict(
        title="A title",
        subtitle="and what it is about",
        images=rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8),
        true_captions=true,
        retrieved_captions=true,
        correct=[True] * count if correct is None else correct,
        similarity=np.eye(32) + rng.normal(0, 0.1, (32, 32)),
        curves={
            "train_loss": (steps, 4 * np.exp(-steps / 100) + rng.normal(0, 0.1, 300)),
            "image → text": ([0, 300, 600], [0.03, 0.5, 0.9]),
            "text → image": ([0, 300, 600], [0.03, 0.4, 0.8]),
        },
        chance={"train_loss": 4.2, "image → text": 1 / 32, "text → image": 1 / 48},
    )


def _pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def _count(pixels, color):
    rgb = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.abs(pixels - rgb).max(axis=-1) <= 2).sum())


def _texts(figure):
    """The texts that are drawn; matplotlib keeps labels of ticks beyond the axes, undrawn."""
    undrawn = set()
    for axes in figure.axes:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = sorted(axis.get_view_interval())
            for tick in axis.get_major_ticks():
                if not low <= tick.get_loc() <= high:
                    undrawn |= {tick.label1, tick.label2}
    texts = figure.findobj(Text)
    return [
        text for text in texts if text.get_text() and text.get_visible() and text not in undrawn
    ]


def test_report_has_its_size_and_is_not_blank(tmp_path):
    path = tmp_path / "new" / "report.png"
    report_sheet(**_arguments()).save(path)
    pixels = _pixels(path)
    assert pixels.shape == (1000, 1600, 3)
    for block in (pixels[:500, :900], pixels[500:, :900], pixels[:500, 1000:], pixels[500:, 1000:]):
        assert 0.02 < (block.min(axis=-1) < 200).mean() < 0.9


def test_flags_change_color_and_show_the_true_caption(tmp_path):
    correct = [True, False] * 6
    report_sheet(**_arguments()).save(tmp_path / "right.png")
    report_sheet(**_arguments(correct=correct)).save(tmp_path / "mixed.png")
    right, mixed = _pixels(tmp_path / "right.png"), _pixels(tmp_path / "mixed.png")
    gallery = np.s_[130:, :980]
    assert _count(right[gallery], WRONG) == 0 and _count(right[gallery], CORRECT) > 1000
    assert _count(mixed[gallery], WRONG) > 1000
    figure = report_sheet(**_arguments(correct=correct)).figure
    frames = [to_hex(axes.spines["top"].get_edgecolor()) for axes in figure.axes[:8]]
    assert frames == [CORRECT, WRONG] * 4
    texts = [text.get_text() for text in _texts(figure)]
    assert any(text.startswith("✗") for text in texts)
    assert any(text.startswith("true: ") for text in texts)


@pytest.mark.parametrize("captions", [("a dog",), (_SHORT, "a green circle"), (_LONG, _LONG[8:])])
@pytest.mark.parametrize("count", [1, 8, 10, 14])
def test_no_text_overlaps_or_leaves_the_figure(captions, count):
    correct = [i % 3 != 1 for i in range(count)]
    figure = report_sheet(**_arguments(count, captions, correct)).figure
    figure.savefig(io.BytesIO(), format="png")
    boxes = [(text.get_text(), text.get_window_extent()) for text in _texts(figure)]
    for i, (name, box) in enumerate(boxes):
        assert box.x0 >= 0 and box.x1 <= 1600 and box.y0 >= 0 and box.y1 <= 1000, name
        for other_name, other in boxes[i + 1 :]:
            width = min(box.x1, other.x1) - max(box.x0, other.x0)
            height = min(box.y1, other.y1) - max(box.y0, other.y0)
            assert width <= 1 or height <= 1, (name, other_name)
    pictures = [axes.get_window_extent() for axes in figure.axes if axes.images]
    for name, box in boxes:
        assert not any(picture.overlaps(box) for picture in pictures), name


def test_long_captions_are_complete():
    correct = [i % 2 == 0 for i in range(12)]
    figure = report_sheet(**_arguments(12, (_LONG,), correct)).figure
    shown = " ".join(text.get_text() for text in _texts(figure))
    assert ELLIPSIS not in shown
    assert shown.count(_LONG) == 15  # ten images: five right, five wrong with both captions


def test_captions_are_not_parsed_as_math(tmp_path):
    report_sheet(**_arguments(8, ("$x_{$ each",))).save(tmp_path / "r.png")
    assert _pixels(tmp_path / "r.png").shape == (1000, 1600, 3)


def test_wrong_arguments_are_refused(tmp_path):
    arguments = _arguments()
    for change in (
        {"correct": [True]},
        {"images": arguments["images"].astype(np.float32)},
        {"chance": {"nothing": 0.5}},
        {"curves": {"accuracy": ([0], [55.0])}, "chance": {}},
    ):
        with pytest.raises(ValueError):
            report_sheet(**{**arguments, **change}).save(tmp_path / "r.png")


@pytest.mark.parametrize("width", [0.3, 0.8, 2.0])
def test_wrapped_lines_fit_and_keep_every_character(width):
    from matplotlib.figure import Figure

    fitter = TextFitter(Figure(dpi=200))
    text = f"{_LONG} Donaudampfschifffahrtsgesellschaft"
    lines = fitter.wrap(text, 7, width)
    assert all(fitter.width(line, 7) <= width for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")


def test_text_that_cannot_fit_is_cut_fairly():
    from matplotlib.figure import Figure

    fitter = TextFitter(Figure(dpi=200))
    paragraphs = [Colored(_LONG, "red"), Colored(_LONG, "gray")]
    lines, complete = fitter.lay_out(paragraphs, 7, 1.0, 0.5)
    assert not complete and len(lines) == 4
    assert [line.color for line in lines] == ["red", "red", "gray", "gray"]
    assert [line.text[-1] == ELLIPSIS for line in lines] == [False, True, False, True]
    lines, complete = fitter.lay_out([Colored("short", "red"), paragraphs[1]], 7, 1.0, 0.5)
    assert [line.color for line in lines] == ["red", "gray", "gray", "gray"]

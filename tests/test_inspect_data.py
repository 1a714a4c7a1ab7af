"""tools.inspect_data on small folders, against what is counted here by other means."""

import collections
import io
import json

import numpy as np
import pytest
from PIL import Image

from vlp_jax.commands import inspect_data
from vlp_jax.commands.inspect_data import main
from vlp_jax.data import scan as data_scan
from vlp_jax.observe.pictures import draw_contact_sheet

CONTEXT = 16
TEXTS = [
    "a fox",
    "a very long caption",
    "Привет",
    "日本語 $x^2$",
    "exactly 14 ch.",
    "15 characters..",
]
CONFIG = """
from ml_collections import ConfigDict
from vlp_jax.config import base


def get_config(arg=None):
    config = base()
    config.tokenizer = ConfigDict({{"name": "bytes", "context_length": {context}}})
    config.data = ConfigDict({data!r})
    config.evaluators = ConfigDict({evaluators!r})
    return config
"""
PREPROCESS = {"choose_text": {}, "decode_image": {}, "resize": {"size": 24}}


def encoded(number, format="jpeg", **options):
    width, height = 30 + number, 20 + 2 * number
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format, **options)
    return stream.getvalue()


def turned(number):
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(number, exif=exif)


@pytest.fixture(scope="module")
def files():
    """Name -> bytes; 17 images, of which three are damaged and three occur twice."""
    files = {f"{n}.jpg": encoded(n) for n in range(12)}
    files |= {"a.png": encoded(3, "png"), "turned.jpg": turned(9)}
    files |= {"again.jpg": encoded(5), "and_again.jpg": encoded(5), "other.jpg": encoded(7)}
    files["4.jpg"] = b"not an image"
    files["8.jpg"] = files["8.jpg"][:-700]  # its header is whole
    files["11.jpg"] = b"nor is this"
    return files


@pytest.fixture(scope="module")
def folder(files, tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    rows = ["path\tcaption\tkind"]
    for number, (name, content) in enumerate(files.items()):
        (root / name).write_bytes(content)
        rows.append(f"{name}\t{TEXTS[number % len(TEXTS)]}\t{'odd' if number % 2 else 'even'}")
    (root / "captions.tsv").write_text("\n".join(rows), encoding="utf-8")
    return root


def data_of(folder, **keys):
    return {"source": "folder", "path": str(folder), "split": "all", "label_field": "kind",
            "preprocess": PREPROCESS, **keys}  # fmt: skip


def write_config(path, data, evaluators=None):
    text = CONFIG.format(context=CONTEXT, data=data, evaluators=evaluators or {})
    path.write_text(text)
    return str(path)


def sources_of(output):
    return json.loads((output / "stats.json").read_text())["sources"]


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.fixture(scope="module")
def inspected(folder, tmp_path_factory):
    """(the folder that was written, what was printed)."""
    root = tmp_path_factory.mktemp("inspected")
    config = write_config(root / "config.py", data_of(folder))
    arguments = ["--config", config, "--output", str(root / "out"), "--examples", "9"]
    with pytest.MonkeyPatch.context() as patch:
        printed = io.StringIO()
        patch.setattr("sys.stdout", printed)
        assert main(arguments) == 0
    return root / "out", printed.getvalue()


def test_the_figures_are_those_of_an_independent_count(inspected, files):
    (stats,) = sources_of(inspected[0]).values()
    names = list(files)
    bad = {"4.jpg", "8.jpg", "11.jpg"}
    usable = [TEXTS[n % len(TEXTS)] for n, name in enumerate(names) if name not in bad]
    lengths = [len(text.encode()) + 2 for text in usable]  # of bytes, with bos and eos
    assert (stats["examples"], stats["scanned"]) == (17, 17)
    text = stats["text"]
    assert text["characters"]["mean"] == pytest.approx(np.mean([len(text) for text in usable]))
    assert text["tokens"]["mean"] == pytest.approx(np.mean(lengths))
    assert (text["tokens"]["min"], text["tokens"]["max"]) == (min(lengths), max(lengths))
    cut = np.mean([length > CONTEXT for length in lengths])
    assert text["truncated_share"] == pytest.approx(cut) and 0 < cut < 1
    histogram = np.repeat(text["histogram"]["from"], text["histogram"]["count"])
    assert sorted(histogram) == sorted(lengths)  # bins are one token wide here

    image = stats["image"]
    assert image["encoded_bytes"]["mean"] == pytest.approx(np.mean([*map(len, files.values())]))
    sizes = [(30 + n, 20 + 2 * n) for n in (*range(4), *range(5, 11), 3, 5, 5, 7)]
    sizes.append((20 + 2 * 9, 30 + 9))  # lies on its side
    assert image["width"]["mean"] == pytest.approx(np.mean([width for width, _ in sizes]))
    assert image["height"]["max"] == max(height for _, height in sizes)
    ratios = [width / height for width, height in sizes]
    assert image["aspect_ratio"]["median"] == pytest.approx(np.median(ratios))
    assert image["formats"] == {"JPEG": 14, "unknown": 2, "PNG": 1}
    copies = collections.Counter(files.values())
    assert stats["duplicates"] == {
        "images": 17,
        "share": pytest.approx(1 - len(copies) / 17),
        "largest_group": 3,
    }
    assert 1 - len(copies) / 17 == pytest.approx(3 / 17)


def test_bad_records_are_counted_by_reason(inspected):
    (stats,) = sources_of(inspected[0]).values()
    assert stats["bad"] == {"undecodable image": 3} and stats["bad_share"] == pytest.approx(3 / 17)
    assert "undecodable image" in inspected[1] and "3 (17.65%)" in inspected[1]


def test_the_pictures_show_something(inspected):
    sheet, figure = (picture(inspected[0] / f"{name}.png") for name in ("contact_sheet", "stats"))
    for image in (sheet, figure):
        assert (image != 255).any(axis=-1).mean() > 0.02
    # Nine images, eight of them in the first row; noise has no two pixels alike.
    ink = (sheet != 255).any(axis=-1)
    columns = np.flatnonzero(ink[: len(ink) // 2].mean(axis=0) > 0.4)
    assert 1 + (np.diff(columns) > 5).sum() == 8


def test_captions_say_what_the_tokens_say(folder, monkeypatch, tmp_path):
    drawn = {}

    def draw(path, images, captions, *, title, subtitle):
        drawn.update(images=images, captions=captions)
        return 0

    monkeypatch.setattr(inspect_data, "draw_contact_sheet", draw)
    evaluators = {"test": {"name": "retrieval", "data": {"limit": 3}}}
    config = write_config(tmp_path / "config.py", data_of(folder), evaluators)
    output = ["--output", str(tmp_path / "out")]
    assert main(["--config", config, "--evaluator", "test", *output, "--examples", "2"]) == 0
    assert drawn["images"].shape == (2, 24, 24, 3)
    assert drawn["captions"] == [["a fox", "label: even (0)"], ["a very long ca", "label: odd (1)"]]
    assert sources_of(tmp_path / "out")["test"]["examples"] == 3


@pytest.mark.slow
def test_a_sample_is_part_of_the_whole(folder, tmp_path):
    config = write_config(tmp_path / "config.py", data_of(folder))
    output = ["--output", str(tmp_path / "out"), "--examples", "1"]
    assert main(["--config", config, "--scan", "5", *output]) == 0
    (stats,) = sources_of(tmp_path / "out").values()
    assert (stats["examples"], stats["scanned"]) == (17, 5)
    assert sum(stats["text"]["histogram"]["count"]) == 5


def test_a_mixture_is_looked_at_source_by_source(folder, tmp_path):
    odd, even = (
        data_of(folder, where={"label": kind}, weight=weight)
        for kind, weight in (("odd", 1.0), ("even", 3.0))
    )
    mixture = {"source": "mixture", "parts": {"one": odd, "two": even}}
    config = write_config(tmp_path / "config.py", mixture)
    assert main(["--config", config, "--output", str(tmp_path / "out"), "--examples", "4"]) == 0
    sources = sources_of(tmp_path / "out")
    assert {name: stats["examples"] for name, stats in sources.items()} == {"one": 8, "two": 9}
    # 4.jpg and 8.jpg are even, 11.jpg is odd.
    assert [sum(stats["bad"].values()) for stats in sources.values()] == [1, 2]
    assert picture(tmp_path / "out" / "contact_sheet.png").std() > 20


def statistics_of(data):
    found = data_scan.scan(
        {**data, "max_bad_fraction": 1.0},
        data_scan.Tokenizers({}, lambda: iter(())),
        count=10,
        seed=0,
        begin=lambda count: None,
        advance=lambda count: None,
    )
    return data_scan.statistics(found, None)


@pytest.mark.parametrize("preprocess", [{}, {"lowercase": {}}])
def test_empty_texts_are_counted(preprocess):
    arrays = {"text": ["one", "", "three", "four", ""]}
    stats = statistics_of({"source": "arrays", "arrays": arrays, "preprocess": preprocess})
    assert stats["text"]["empty"] == 2 and stats["scanned"] == 5
    assert "tokens" not in stats["text"] and "image" not in stats


def test_data_without_text_or_encoded_images(tmp_path):
    arrays = {"image": np.zeros((6, 5, 7, 3), np.uint8), "label": np.arange(6)}
    arrays["image"][3] = 9
    stats = statistics_of({"source": "arrays", "arrays": arrays})
    assert "text" not in stats and stats["scanned"] == 6 and stats["bad"] == {}
    assert stats["image"]["aspect_ratio"]["mean"] == pytest.approx(7 / 5)
    assert stats["image"]["encoded_bytes"] is None
    assert stats["duplicates"] == {"images": 6, "share": pytest.approx(4 / 6), "largest_group": 5}


def test_the_sheet_says_which_characters_no_font_has(tmp_path):
    images = np.zeros((2, 8, 8, 3), np.uint8)
    captions = [["plain", "label: 3"], ["no font has \U0010fffd this"]]
    words = {"title": "title", "subtitle": "subtitle"}
    assert draw_contact_sheet(tmp_path / "a.png", images, captions, **words) == 1
    assert draw_contact_sheet(tmp_path / "b.png", images[:1], captions[:1], **words) == 0
    with pytest.raises(ValueError, match="2 images and 1 captions"):
        draw_contact_sheet(tmp_path / "c.png", images, captions[:1], **words)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--evaluator", "tset"], "no evaluator 'tset' (it has: none)"),
        (["--scan", "0"], "--scan must be at least 1, not 0"),
        (["--sacn", "5"], "unknown argument '--sacn'"),
        (["--config.data.path=/nowhere"], "'/nowhere' is not a folder"),
        (["--config.data.pth=x"], "did you mean 'path'?"),
        (["--output", "/dev/null/x"], "--output /dev/null/x cannot be made"),
    ],
)
def test_mistakes_end_in_one_line(folder, tmp_path, arguments, words, capsys):
    config = write_config(tmp_path / "config.py", data_of(folder))
    output = tmp_path / "out"
    assert main(["--config", config, "--output", str(output), *arguments]) == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
    assert not (output / "stats.json").exists()

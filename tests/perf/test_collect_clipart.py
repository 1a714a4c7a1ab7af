"""Debian's clip art as a folder of pictures with captions."""

import csv

import numpy as np
import PIL.Image
import pytest

from tools.perf import collect_clipart
from vlp_jax.data.sources import build_source

SVG = """<?xml version="1.0"?>
<svg xmlns="http://www.w3.org/2000/svg"><metadata>
<rdf:RDF xmlns:cc="http://web.resource.org/cc/" xmlns:dc="http://purl.org/dc/elements/1.1/"
 xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><cc:Work>
<dc:title>{title}</dc:title><dc:subject><rdf:Bag>{words}</rdf:Bag></dc:subject>
<dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator></cc:Work></rdf:RDF>
</metadata></svg>"""


@pytest.fixture
def roots(tmp_path):
    """Both packages, small."""
    clipart, stamps = tmp_path / "openclipart", tmp_path / "stamps"

    def add(name, title, words, author, seed, size=(300, 200)):
        for kind in ("svg", "png"):
            (clipart / kind / name).parent.mkdir(parents=True, exist_ok=True)
        keywords = "".join(f"<rdf:li>{word}</rdf:li>" for word in words)
        svg = SVG.format(title=title, words=keywords, author=author)
        (clipart / "svg" / f"{name}.svg").write_text(svg)
        pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 4), np.uint8)
        PIL.Image.fromarray(pixels).save(clipart / "png" / f"{name}.png")

    add(
        "animals/bored_dog_jose_hev_01", "Bored dog", ["dog", "", "animal", "hash"], "Jose Hevia", 1
    )
    add("animals/copy_of_it", "Bored dog", ["dog"], "Jose Hevia", 1)  # the same pixels
    add("food/red_apple", "", ["food"], "x", 2, (40, 30))
    for number in range(collect_clipart.COLLECTION + 1):
        add(f"icons/icon_{number:02}a{number}", "A whole collection", ["icon"], "x", 10 + number)
    (stamps / "sea").mkdir(parents=True)
    (stamps / "sea" / "whale.txt").write_text("A whale.\\nde.utf8=Ein Wal.\\n".replace("\\n", "\n"))
    PIL.Image.new("RGB", (500, 400), "blue").save(stamps / "sea" / "whale.png")
    (stamps / "sea" / "none.txt").write_text("Has no picture.\n")
    return clipart, stamps


def test_pictures_get_captions_and_are_there_once(roots, tmp_path, capsys):
    clipart, stamps = roots
    arguments = ["--output", tmp_path / "out", "--clipart", clipart, "--stamps", stamps]
    assert collect_clipart.main([*map(str, arguments), "--side", "64"]) == 0
    with open(tmp_path / "out" / "captions.csv", newline="") as file:
        rows = {row["path"]: row for row in csv.DictReader(file)}
    assert rows["animals/bored_dog_jose_hev_01.png"]["caption"] == "Bored dog, animal, dog"
    assert rows["food/red_apple.png"] == {
        "path": "food/red_apple.png", "caption": "red apple, food", "category": "food"
    }  # fmt: skip
    assert "animals/copy_of_it.png" not in rows
    assert rows["stamps/sea/whale.png"]["caption"] == "A whale."
    icon = rows["icons/icon_00a0.png"]["caption"]
    assert icon == "icon 00a0, icon"  # not what all of a collection share
    assert f"{len(rows)} of {len(rows) + 1} pictures differ" in capsys.readouterr().out
    with PIL.Image.open(tmp_path / "out" / "animals/bored_dog_jose_hev_01.png") as image:
        assert image.mode == "RGB" and image.size == (96, 64)
    with PIL.Image.open(tmp_path / "out" / "food/red_apple.png") as image:
        assert image.size == (40, 30)  # small ones stay as they are
    source = build_source({"source": "folder", "path": str(tmp_path / "out"), "split": "all"})
    assert len(source) == len(rows)


def test_what_is_missing_is_said(tmp_path, capsys):
    arguments = ["--output", tmp_path / "out", "--clipart", tmp_path, "--stamps", tmp_path]
    assert collect_clipart.main(list(map(str, arguments))) == 2
    assert "apt-get install" in capsys.readouterr().err


def test_a_name_loses_its_author_alone():
    name = collect_clipart.name_without_author
    assert name("sea_lion_architetto_fra_01", ["architetto francesco rollandin"]) == "sea lion"
    assert name("red_car_03", ["somebody else"]) == "red car"
    assert name("rose", ["rose"]) == "rose"

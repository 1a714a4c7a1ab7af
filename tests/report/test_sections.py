"""What the sections tell, against scikit-learn and NumPy."""

import dataclasses
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from sklearn import metrics

from vlp_jax import config as config_lib
from vlp_jax import defaults
from vlp_jax.data.scan import Scan
from vlp_jax.evaluators.base import Scores
from vlp_jax.evaluators.captioning import CaptionsOutcome
from vlp_jax.report import section_retrieval, section_zero_shot
from vlp_jax.report.blocks import Beside, Cards, Charts, Fold, Table
from vlp_jax.report.pictures import Album, heat_section, paintings_section, samples_section
from vlp_jax.report.report import table_section
from vlp_jax.report.scores import (
    Score,
    better_direction,
    chance_of,
    headlines,
    scores_of,
    title_of,
)
from vlp_jax.report.section_data import data_section
from vlp_jax.report.section_run import config_section, differences, flat

SCORES = {
    "step": 7.0,
    "eval/retrieval/image_to_text_r1": 0.5,
    "eval/retrieval/image_to_text_r5": 0.9,
    "eval/retrieval/text_to_image_r1": 0.4,
    "eval/retrieval/image_to_text_median_rank": 2.0,
    "eval/retrieval/pairs": 50.0,
    "eval/retrieval/chance_r1": 0.02,
    "eval/zs/top1": 0.75,
    "eval/zs/top5": 1.0,
    "eval/zs/nll": 0.4,
    "eval/zs/examples": 100.0,
    "eval/zs/classes": 4.0,
    "eval/zs/chance": 0.25,
    "eval/space/modality_gap": 0.8,
    "eval/paint/error": 0.3,
    "eval/paint/examples": 10.0,
    "eval/says/cider": 1.2,
    "eval/says/cider_shuffled": 0.2,
    "eval/says/words": 9.0,
}


def blocks_of(section, kind):
    """The blocks of a kind, also those inside others."""
    found, rest = [], list(section.blocks)
    while rest:
        block = rest.pop(0)
        found += [block] if isinstance(block, kind) else []
        rest = list(block.blocks) + rest if isinstance(block, Beside | Fold) else rest
    return found


def test_chance():
    named = {"image_to_text_r1": 0.5, "chance_r1": 0.02}
    assert chance_of("image_to_text_r5", named) == pytest.approx(0.1)
    assert chance_of("image_to_text_r100", named) == 1
    assert chance_of("top5", {"classes": 48.0}) == pytest.approx(5 / 48)
    assert chance_of("mean_per_class_recall", {"chance": 0.25}) == 0.25
    assert chance_of("top1_4shot", {"classes": 10.0}) == pytest.approx(0.1)
    assert chance_of("top1_4shot_std", {"classes": 10.0}) is None
    assert chance_of("top5", {"classes": 3.0}) == 1
    assert chance_of("error", {"examples": 3.0}) is None


def test_what_is_better():
    for name in ("top1", "image_to_text_r10", "mean_per_class_recall", "text_to_image_mrr"):
        assert better_direction(name) == 1, name
    for name in ("error", "nll", "calibration_error", "image_to_text_median_rank", "loss"):
        assert better_direction(name) == -1, name
    for name in ("modality_gap", "alignment", "top1_4shot_std"):
        assert better_direction(name) == 0, name


@pytest.mark.parametrize(
    ("name", "value", "baseline", "change"),
    [
        ("top1", 0.75, 0.5, "▲ +25.0\N{NO-BREAK SPACE}points, better"),
        ("top1", 0.5, 0.75, "▼ \N{MINUS SIGN}25.0\N{NO-BREAK SPACE}points, worse"),
        ("nll", 0.5, 0.75, "▲ \N{MINUS SIGN}0.25, better"),
        ("median_rank", 3.0, 2.0, "▼ +1, worse"),
        ("modality_gap", 0.5, 0.75, "\N{MINUS SIGN}0.25"),
        ("top1", 0.5, 0.5, "equal"),
        ("top1", 0.5, None, ""),
    ],
)
def test_a_change_says_in_words_what_it_is(name, value, baseline, change):
    assert Score("e", name, value, None, baseline).change == change


def test_headlines_are_one_of_each_evaluator_and_both_ways_of_retrieval():
    found = [(s.evaluator, s.name) for s in headlines(SCORES, None)]
    assert found == [
        ("retrieval", "image_to_text_r1"),
        ("retrieval", "text_to_image_r1"),
        ("zs", "top1"),
        ("paint", "error"),
        ("says", "cider"),
    ]
    said = {score.name: score for score in scores_of(SCORES) if score.evaluator == "says"}
    assert said["cider"].chance == 0.2 and set(said) == {"cider", "words"}
    assert title_of("cider") == "CIDEr-D" and better_direction("cider") == 1
    assert better_direction("words") == better_direction("different") == 0
    assert title_of("image_to_text_r1") == "image to text R@1" and title_of("top5") == "top-5"


def test_the_table_holds_every_score_once_and_no_count():
    (table,) = blocks_of(table_section(SCORES, None, []), Table)
    rows = [row for row in table.rows if len(row) > 1]
    assert len(rows) == len(list(scores_of(SCORES))) == 11
    groups = [row[0] for row in table.rows if len(row) == 1]
    assert groups[0] == "retrieval (50 pairs)" and groups[1] == "zs (100 examples, 4 classes)"
    assert [row[1].text for row in rows if row[0] == "top-1"] == ["75.0\N{NO-BREAK SPACE}%"]


def test_confusions_are_those_of_scikit_learn(zero_shot):
    predicted = section_zero_shot.predictions(zero_shot)
    counts = section_zero_shot.confusion(zero_shot)
    labels = range(len(zero_shot.class_names))
    np.testing.assert_array_equal(
        counts, metrics.confusion_matrix(zero_shot.labels, predicted, labels=labels)
    )
    wrong = section_zero_shot.mistakes(zero_shot, 300)
    assert sorted(wrong) == np.flatnonzero(predicted != zero_shot.labels).tolist()
    assert 10 < len(wrong) < 290


def test_the_section_of_zero_shot(zero_shot):
    predicted = section_zero_shot.predictions(zero_shot)
    pixels = np.full((16, 16, 3), 100, np.uint8)
    images = {int(zero_shot.index[r]): pixels for r in section_zero_shot.mistakes(zero_shot)}
    section = section_zero_shot.zero_shot_section("zs", zero_shot, images, Album(10**6))
    # Ten classes have images, so the rest is neither a row nor, unless predicted, a column.
    svg = ET.fromstring(str(blocks_of(section, Charts)[0].charts[0].svg))
    cells = [path for path in svg.iter("path") if path.find("title") is not None]
    told = [int(c.find("title").text.rpartition(": ")[2].split(" of ")[0]) for c in cells]
    assert sum(told) == 300
    right = [n for c, n in zip(cells, told) if c.get("class") == "f-accent"]
    assert sum(right) == (predicted == zero_shot.labels).sum()
    recalls = metrics.recall_score(
        zero_shot.labels, predicted, average=None, labels=range(10), zero_division=0
    )
    table = next(t for t in blocks_of(section, Table) if "ecall" in t.caption)
    worst = zero_shot.class_names[int(recalls.argmin())]
    assert table.rows[0][0] == worst
    assert float(table.rows[0][1].text.split()[0]) == pytest.approx(100 * recalls.min(), abs=0.06)
    confused = next(t for t in blocks_of(section, Table) if t.head[0] == "true class")
    most = np.max(section_zero_shot.confusion(zero_shot) * (1 - np.eye(12, dtype=int)))
    assert int(confused.rows[0][2].split(" of ")[0]) == most
    (cards,) = blocks_of(section, Cards)
    assert len(cards.cards) == section_zero_shot.MISTAKES


def test_many_classes_show_those_that_are_confused_most():
    rng = np.random.default_rng(0)
    from tests.report.conftest import unit
    from vlp_jax.evaluators.zero_shot import ZeroShotOutcome

    classes = unit(rng.normal(size=(300, 16)))
    labels = rng.integers(0, 300, 3000)
    outcome = ZeroShotOutcome(
        image=unit(classes[labels] + 0.5 * rng.normal(size=(3000, 16))),
        class_embeddings=classes,
        labels=labels,
        class_names=tuple(f"class number {n}" for n in range(300)),
        index=np.arange(3000),
        logit_scale=None,
    )
    section = section_zero_shot.zero_shot_section("zs", outcome, {}, Album(0))
    svg = str(blocks_of(section, Charts)[0].charts[0].svg)
    names = {t.text for t in ET.fromstring(svg).iter("text")}
    assert len(names) == section_zero_shot.MOST_CLASSES and len(svg) < 400_000
    errors = section_zero_shot.confusion(outcome) * (1 - np.eye(300, dtype=int))
    most = int((errors.sum(axis=0) + errors.sum(axis=1)).argmax())
    assert f"class number {most}" in names
    assert "Calibration" not in [c.title for b in blocks_of(section, Charts) for c in b.charts]


def test_retrieval_shows_what_was_found_and_the_worst(retrieval):
    choice = section_retrieval.choose(retrieval)
    similarity = retrieval.image @ retrieval.text.T
    own = np.where(retrieval.owners == np.arange(40)[:, None], similarity, -2).max(axis=1)
    rank = (similarity > own[:, None] + 1e-6).sum(axis=1) + 1
    assert (rank[choice.found_images] == 1).all() and len(choice.found_images) == 4
    assert rank[choice.lost_images].min() >= np.sort(rank)[-len(choice.lost_images)]
    rows = section_retrieval.images_of(retrieval, choice)
    pixels = {row: np.full((8, 8, 3), row, np.uint8) for row in rows}
    texts = [f"text {n}" for n in range(len(retrieval.text))]
    section = section_retrieval.retrieval_section("r", retrieval, texts, pixels, Album(10**6))
    cards = {block.title: block.cards for block in blocks_of(section, Cards)}
    worst = cards["Images whose text is ranked lowest"][0]
    row = choice.lost_images[0]
    assert worst.verdict == (f"rank {rank[row]} of {len(texts)}", "bad")
    lines = dict(worst.lines)
    assert lines["ranked first"].startswith(f"text {similarity[row].argmax()} (")
    best = max(np.flatnonzero(retrieval.owners == row), key=lambda text: similarity[row, text])
    assert any(text.startswith(f"text {best} (") for key, text in worst.lines if "own" in key)
    assert all(len(card.pictures) == 1 for card in cards["Texts whose image is ranked first"])
    two = cards["Texts whose image is ranked lowest"][0]
    assert [picture.label for picture in two.pictures] == ["ranked first", "right"]


def test_samples_of_captions_are_cards():
    outcome = CaptionsOutcome(
        captions=("a red star", "a blue star", "a box"),
        references=(("the star", "x"), ("it",), ("a crate",)),
        likelihood=np.zeros(3),
        index=np.array([0, 2, 5]),
        labels=np.zeros(0, np.int64),
        pictures={0: np.zeros((8, 8, 3), np.uint8), 5: np.zeros((8, 8, 3), np.uint8)},
    )
    section = samples_section("captions", outcome, Album(10**6))
    ((first, second),) = [block.cards for block in blocks_of(section, Cards)]
    assert first.lines == [("the model", "a red star"), ("a reference", "the star")]
    assert second.lines == [("the model", "a box"), ("a reference", "a crate")]
    assert len(first.pictures) == len(second.pictures) == 1
    assert samples_section("captions", outcome, Album(0)) is None
    assert samples_section("scores", Scores({"top1": 0.5}), Album(10**6)) is None


def test_every_outcome_that_the_page_shows_has_its_section():
    from vlp_jax.report.report import SECTIONS

    assert {"CaptionsOutcome", "ReconstructionOutcome", "RetrievalOutcome", "ZeroShotOutcome"} == {
        kind.__name__ for kind in SECTIONS
    }


def test_pictures_that_there_is_no_room_for_are_left_out(retrieval):
    album = Album(0)
    rows = section_retrieval.images_of(retrieval, section_retrieval.choose(retrieval))
    pixels = {row: np.zeros((8, 8, 3), np.uint8) for row in rows}
    texts = ["x"] * len(retrieval.text)
    section = section_retrieval.retrieval_section("r", retrieval, texts, pixels, album)
    assert not blocks_of(section, Cards) and album.left_out > 10
    assert heat_section([], album) is None
    assert paintings_section(np.zeros((2, 3, 8, 8, 3)), 0.75, album) is None


def test_configs_differ_in_what_was_changed():
    one, other = config_lib.load("configs/demo.py"), config_lib.load("configs/demo.py")
    config_lib.override(other, ["optimizer.learning_rate=0.5", "evaluators.retrieval=None"])
    keys = differences({"a": flat(one), "b": flat(other)})
    assert "optimizer.learning_rate" in keys
    assert all(k == "optimizer.learning_rate" or "evaluators.retrieval." in k for k in keys)
    same = config_section(one, one, "baseline")
    assert "No key differs" in same.blocks[0].text
    (table, *_) = config_section(one, None, "").blocks
    told = {row[0]: row[1:] for row in table.rows}
    assert told["optimizer.name"] == [defaults.base().optimizer.name, one.optimizer.name]
    assert not any(key.startswith("objective") for key in told)


def test_data_that_cannot_be_looked_at_is_said_and_no_error():
    (text,) = data_section("no such folder", None).blocks
    assert "no such folder" in text.text


def test_figures_of_the_data():
    part = Scan(1000, 4, tokens=[3, 5, 90, 7], characters=[9, 9, 9, 9], sizes=[(8, 6), (8, 6)])
    part.bad["damaged"] = 1
    part.digests.update([b"a", b"b", b"b"])
    section = data_section({"data": part}, 77)
    rows = dict(row for table in blocks_of(section, Table) for row in table.rows)
    assert rows["examples"] == "1,000" and rows["of these not usable"] == "1 (damaged 1)"
    assert rows["images that occur twice"] == "33.3\N{NO-BREAK SPACE}%"
    assert rows["width, pixels"] == "8" and "formats" not in rows
    (charts,) = blocks_of(section, Charts)
    assert "25.0\N{NO-BREAK SPACE}% are longer" in charts.charts[0].caption
    two = data_section({"a": part, "b": dataclasses.replace(part, tokens=[])}, 77)
    assert blocks_of(two, Table)[0].head == ["", "a", "b"]

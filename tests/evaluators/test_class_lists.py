"""Classes that two sides number in their own ways are matched by name, or named as different."""

import json
import types

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier
from toy_models import functions, make_resources, make_world

from tools.perf import check_exports
from vlp_jax.commands import write_evaluation_tars
from vlp_jax.data.pipeline import TrainPipeline
from vlp_jax.data.sources.labels import WordClasses, same_numbers
from vlp_jax.errors import UserError
from vlp_jax.evaluators import class_lists, make_evaluators
from vlp_jax.objectives.base import of_images

COLORS = ("black", "blue", "green", "red", "white", "yellow")
SEEN, TESTED = COLORS[:5], COLORS[1:]
EACH, SIDE = 6, 4
# Image of patterns, each of a color; the noise is too small to mistake one for another.
PATTERNS = np.random.default_rng(9).integers(0, 200, (6, SIDE, SIDE, 3))
PREPROCESS = {"decode_image": {}, "resize": {"size": SIDE}, "keep": {"fields": ("image", "label")}}


def write(folder, colors, label=str):
    """A folder of pictures of these colors, with their pixels and words."""
    folder.mkdir()
    rng, rows, pixels, words = np.random.default_rng(len(colors)), ["path,caption,label"], [], []
    for number in range(EACH * len(colors)):
        color = colors[number % len(colors)]
        noise = rng.integers(0, 56, (SIDE, SIDE, 3))
        pixels.append((PATTERNS[COLORS.index(color)] + noise).astype(np.uint8))
        words.append(color)
        Image.fromarray(pixels[-1]).save(folder / f"{number}.png")
        rows.append(f"{number}.png,x,{label(color)}")
    (folder / "c.csv").write_text("\n".join(rows))
    return np.array(pixels), words


def data_of(folder, **keys):
    keys = {"source": "folder", "path": str(folder), "split": "all", "label_field": "label", **keys}
    return {**keys, "preprocess": PREPROCESS}


def classify(params, image):
    """The score of each color of the training folder: less for each pixel that is off."""
    distance = image[:, None].astype(np.float32) - params["patterns"] - 28
    return -(distance**2).sum(axis=(2, 3, 4))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    found = make_world()
    pixels = {name: write(root / name, colors) for name, colors in
              {"train": SEEN, "test": TESTED, "few": ("white", "blue")}.items()}  # fmt: skip
    params = {**found.params, "patterns": PATTERNS[:5].astype(np.float32)}
    own = {**functions(), "classify": of_images(classify, "scores")}
    resources = make_resources(own_functions=own)
    return types.SimpleNamespace(root=root, pixels=pixels, params=params, resources=resources)


def make(world, section, data, trained=None):
    trained = trained or data_of(world.root / "train")
    return make_evaluators({"x": {**section, "data": data}}, trained, world.resources)["x"]


@pytest.mark.parametrize(
    ("section", "score"),
    [
        ({"name": "knn", "ks": (1, 5)}, "top1_k5"),
        ({"name": "few_shot", "shots": (4,), "seeds": 1, "grid": (1.0,)}, "top1_4shot"),
        ({"name": "linear_probe", "grid": (1e4,)}, "top1"),
    ],
)
def test_probes_of_two_folders_match_classes_by_name(world, section, score, caplog):
    section = {**section, "train_data": {"path": str(world.root / "train")}}
    outcome = make(world, section, data_of(world.root / "test")).outcome(world.params)
    assert outcome.scores()[score] == pytest.approx(4 / 5)  # "yellow" was never seen
    assert (
        "train_data lacks 1 of the 5 classes of data, which count as wrong: 'yellow'" in caplog.text
    )
    (train, words), (test, answers) = world.pixels["train"], world.pixels["test"]
    names = np.array(outcome.features.class_names)
    assert names[outcome.features.train_labels].tolist() == words
    assert names[outcome.features.test_labels].tolist() == answers
    if section["name"] == "knn":
        x, y = (p.reshape(len(p), -1) / 1.0 @ world.params["image"] for p in (train, test))
        judge = KNeighborsClassifier(1, metric="cosine").fit(x, words)  # it takes words as they are
        assert outcome.scores()["top1_k1"] == pytest.approx(judge.score(y, answers))


def test_zero_shot_matches_the_words_of_a_folder_by_name(world):
    names = COLORS[::-1]
    section = {"name": "zero_shot", "class_names": names, "templates": ("{}",)}
    evaluator = make(world, section, data_of(world.root / "few"))
    outcome = evaluator.outcome(world.params)
    assert [names[label] for label in outcome.labels] == world.pixels["few"][1]
    robust = {**section, "name": "robustness", "corruptions": (), "radii": ()}
    scores = dict(make(world, robust, data_of(world.root / "few"))(world.params))
    assert scores["clean"] == outcome.scores()["top1"]
    for lacking in (("a white card", "a blue card"), ("white",)):
        with pytest.raises(UserError, match="class_names lacks .*'blue'"):
            make(world, {**section, "class_names": lacking}, data_of(world.root / "few"))
    # Whole numbers are numbers of class_names.
    with pytest.raises(UserError, match="no names of the classes"):
        (world.root / "few" / "n.csv").write_text("path,caption,label\n0.png,x,3\n")
        data = data_of(world.root / "few", captions="n.csv")
        make(world, {"name": "zero_shot"}, data)
    numbered = make(world, section, data_of(world.root / "few", captions="n.csv"))
    assert numbered.outcome(world.params).labels.tolist() == [3]


def test_a_classifier_is_asked_for_the_classes_that_it_was_trained_on(world, tmp_path, caplog):
    few = data_of(world.root / "few", captions="c.csv")
    scores = dict(make(world, {"name": "accuracy"}, few)(world.params))
    assert scores["top1"] == 1 and scores["classes"] == 5
    robust = {"name": "robustness", "corruptions": (), "radii": ()}
    assert dict(make(world, robust, few)(world.params))["clean"] == 1
    with pytest.raises(UserError, match="the training data lacks 'yellow', a class of 'label'"):
        make(world, {"name": "accuracy"}, data_of(world.root / "test"))
    numbers = data_of(world.root / "few", captions="n.csv")
    with pytest.raises(UserError, match="are words .*'black'.* are numbers: set data.label_names"):
        make(world, {"name": "accuracy"}, numbers)
    make(world, {"name": "accuracy"}, few, trained=data_of(tmp_path / "gone"))
    assert "the training data cannot be opened" in caplog.text


def test_parts_of_a_mixture_must_number_classes_alike(world):
    def mixture(**keys):
        parts = {name: {**data_of(world.root / name, captions="c.csv", **keys), "weight": 1}
                 for name in ("train", "few")}  # fmt: skip
        return TrainPipeline({"source": "mixture", "parts": parts}, None, batch_size=4, seed=0)

    with pytest.raises(UserError, match="'label' differently: train has 'black'.*few has 'blue'"):
        mixture().check_classes("label", 5)
    listed = mixture(label_names=COLORS)
    listed.check_classes("label", 6)
    with pytest.raises(UserError, match="6 classes in 'label' .* the objective tells 5"):
        listed.check_classes("label", 5)
    prompts = {"prompt_template": {"templates": "a {}", "field": "label", "names": COLORS[::-1]}}
    data = {**data_of(world.root / "few", captions="c.csv"), "preprocess": prompts}
    with pytest.raises(UserError, match="prompt_template: names are 'yellow'.*data are 'blue'"):
        TrainPipeline(data, None, batch_size=4, seed=0)


def test_a_task_for_other_programs_has_the_names_and_places_of_the_evaluator(world, tmp_path):
    (tmp_path / "names.txt").write_text("# no class\n" + "\n".join(COLORS[::-1]), "utf-8-sig")
    (tmp_path / "templates.txt").write_text("a {c} card\n{}\n", "utf-8-sig")
    files = {
        key: str(tmp_path / f"{key.split('_')[-1]}.txt") for key in ("class_names", "templates")
    }
    section = {"name": "zero_shot", **files}
    data = data_of(world.root / "few", captions="c.csv")
    config = ConfigDict({"data": data, "evaluators": {"x": section}})
    check_exports.write_task(config, "x", tmp_path / "task")
    task = json.loads((tmp_path / "task" / "task.json").read_text())
    assert task["prompts"] == [[f"a {color} card", color] for color in COLORS[::-1]]
    assert [COLORS[::-1][label] for label in task["labels"]] == world.pixels["few"][1]
    names, number = write_evaluation_tars.class_names(config.evaluators.x, data, "label")
    assert names == list(COLORS[::-1]) and [names[number(n)] for n in (0, 1)] == ["blue", "white"]


IDS, NAMES = ("n1", "n2", "n3"), ("tench", "hen", "crane")


@pytest.mark.parametrize(
    ("names", "others", "same"),
    [
        (IDS, NAMES, True),  # two lists that somebody wrote, in one order
        (NAMES, ("tench", "hen", "crane bird"), True),
        (NAMES, ("hen", "tench", "crane"), False),
        (NAMES, NAMES[:2], False),
        (WordClasses(NAMES), NAMES, True),
        (WordClasses(IDS), NAMES, False),
        (None, NAMES, True),
        (None, WordClasses(NAMES), False),
        (None, None, True),
    ],
)
def test_when_two_lists_have_the_same_numbers(names, others, same):
    assert same_numbers(names, others) == same_numbers(others, names) == same


def test_lists_that_are_joined_or_refused():
    names, numbers = class_lists.joined_classes(("a", "b", "c"), ("c", "d", "a"))
    assert names == ("a", "b", "c", "d") and numbers.tolist() == [2, 3, 0]
    assert class_lists.joined_classes(None, None) == (None, None)
    assert class_lists.joined_classes(None, IDS) == class_lists.joined_classes(IDS, None)
    with pytest.raises(UserError, match="no class in common: 'a', 'b', and 'c', 'd'"):
        class_lists.joined_classes(("a", "b"), WordClasses(("c", "d")))
    with pytest.raises(UserError, match="train_data are words .'c'.*of data are numbers"):
        class_lists.joined_classes(WordClasses(("c",)), None)
    labels = class_lists.renumber(np.array([0, 2, 5, -1]), numbers)
    assert labels.tolist() == [2, 0, 5, -1]  # what is no class stays, and is refused later


def test_names_that_are_spelled_alike_are_one_class():
    names = WordClasses(("Red_card", "blue  card", "größe"))
    numbers = class_lists.numbers_onto(
        names, ("GRÖSSE", "red card", "Blue-Card"), "data", "class_names"
    )
    assert numbers.tolist() == [1, 2, 0]
    # Two that are spelled alike are two classes: each goes by its exact name, or is lacking.
    assert class_lists.numbers_onto(
        WordClasses(("A", "a")), ("a", "A"), "data", "names"
    ).tolist() == [1, 0]
    with pytest.raises(UserError, match="names lacks 'AB'.*data.label_names"):
        class_lists.numbers_onto(WordClasses(("AB", "c")), ("ab", "Ab", "c"), "data", "names")
    names, numbers = class_lists.joined_classes(
        WordClasses(("dog", "cat")), WordClasses(("Cat", "Emu"))
    )
    assert names == ("dog", "cat", "Emu") and numbers.tolist() == [1, 2]

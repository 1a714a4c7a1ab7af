"""`vlp-jax look-inside` and tools.perf.measure_heat_maps on a small run that was not trained."""

import json
import types

import numpy as np
import PIL.Image
import pytest
import runs

from tools.perf import measure_heat_maps
from tools.perf.measure_heat_maps import Case
from vlp_jax.commands import look_inside
from vlp_jax.errors import UserError


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    preprocess = {"decode_image": {}, "resize": {"size": 24}}
    runs.write_run(runs.run_config(runs.CLIP, runs.SUBWORD, preprocess), workdir)
    return workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.jpg", "b/3.PNG", "4.webp"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(rng.integers(0, 256, (30, 40, 3), np.uint8)).save(path)
    (folder / "notes.txt").write_text("no image")
    return folder


def test_everything_is_drawn(workdir, folder, tmp_path, capsys):
    long = "a red circle and " * 9
    arguments = ["--workdir", workdir, "--image", folder / "4.webp", "--text", "a red circle"]
    arguments += ["--text", long, "--neighbours", 9, "--projection", "pca", "--among", folder]
    assert look_inside.main([str(a) for a in [*arguments, "--output", tmp_path / "looks"]]) == 0
    said = capsys.readouterr()
    names = ["heat_maps", "relevance_1", "relevance_2", "attention", "rollout"]
    names += ["neighbours", "projection"]
    assert said.out.split("\n")[:-1] == [f"wrote {tmp_path}/looks/{name}.png" for name in names]
    assert said.err.count("warning: text 1 has") == 1 and "reads the first 12" in said.err
    for name in names:
        with PIL.Image.open(tmp_path / "looks" / f"{name}.png") as image:
            assert image.width >= 900 and np.asarray(image.convert("L")).std() > 10


def test_without_a_text_there_is_attention_alone(workdir, folder, tmp_path, capsys):
    arguments = ["--workdir", workdir, "--image", folder / "4.webp", "--output", tmp_path]
    assert look_inside.main([str(a) for a in arguments]) == 0
    assert capsys.readouterr().out.count("wrote") == 2


def test_the_nearest_of_a_collection_is_the_image_itself(workdir, folder):
    encoder = look_inside.vlp_jax.load(workdir)
    collection = look_inside.collect(encoder, folder, 10)
    assert collection.names == ["4.webp", "a/1.png", "a/2.jpg", "b/3.PNG"]
    assert collection.groups == [".", "a", "a", "b"]
    index = encoder.apply("embed_image", collection.pixels)
    rows, products = look_inside.nearest(index, index, 1)
    assert rows[:, 0].tolist() == [0, 1, 2, 3] and products.min() > 0.999
    scenes = look_inside.collect(encoder, None, 5)
    assert len(scenes.pixels) == 5 and all(
        name.startswith(group) for name, group in zip(scenes.names, scenes.groups)
    )


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--image", "nothing.png"], "nothing.png is no file"),
        (["--image", "{folder}/notes.txt"], "notes.txt is not an image that can be read"),
        (["--image", "{folder}/wide.png"], "wide.png is too large: Image size (180000000 pixels)"),
        (["--text", " "], "text 0 is empty"),
        (["--method", "window"], "did you mean 'windows'"),
        (["--projection", "umap"], "unknown key 'umap' in --projection"),
        (["--method", "relevance", "--against", "a dog"], "nothing to go --against"),
        (["--weights", "hf:models"], "name one model"),
        (["--among", "nowhere", "--neighbours", "2"], "--among nowhere is no folder"),
        (["--among", "{folder}/a", "--neighbours", "2"], "holds 2 images; at least 3 are needed"),
        (["--limit", "2"], "--limit at least 3"),
        (["--output", "{folder}/notes.txt/x"], "cannot be made: Not a directory"),
    ],
)
def test_mistakes_end_in_one_line(workdir, folder, tmp_path, capsys, more, words):
    wide = folder / "wide.png"
    if "wide" in str(more) and not wide.exists():
        PIL.Image.new("1", (20_000, 9_000)).save(wide)
    arguments = ["--workdir", str(workdir), "--image", str(folder / "4.webp")]
    arguments += ["--output", str(tmp_path / "out")]
    arguments += [part.replace("{folder}", str(folder)) for part in more]
    try:
        assert look_inside.main(arguments) == 2
    finally:
        wide.unlink(missing_ok=True)
    error = capsys.readouterr().err.strip()
    assert words in error and error.count("\n") == 0 and error.startswith("error: ")


def test_the_pointing_game_is_won_by_a_map_of_the_boxes():
    boxes = [(0.0, 0.5, 0.25, 1.0), (0.5, 0.0, 1.0, 0.25), (0.4, 0.4, 0.6, 0.6)]
    cases = [Case(n, "red circle", box) for n, box in enumerate(boxes)]
    maps = np.zeros((3, 8, 8))
    maps[0, 1, 4] = maps[1, 7, 1] = maps[2, 0, 0] = 1
    assert measure_heat_maps.in_box(maps, cases).tolist() == [True, True, False]
    np.testing.assert_allclose(measure_heat_maps.areas(cases), [0.125, 0.125, 0.04])
    assert measure_heat_maps.middle_hits(cases).tolist() == [False, False, True]
    low, high = measure_heat_maps.interval(
        8, 10
    )  # statsmodels' proportion_confint(8, 10, "wilson")
    np.testing.assert_allclose([low, high], [0.490162, 0.943318], atol=1e-5)


def test_cases_are_objects_that_are_alone_in_their_class():
    encoder = types.SimpleNamespace(images=lambda image, name: np.asarray(image))
    images, cases = measure_heat_maps.read_scenes("test", 40, encoder)
    assert images.shape == (40, 64, 64, 3) and len({case.scene for case in cases}) > 30
    seen = [(case.scene, case.label) for case in cases]
    assert len(set(seen)) == len(seen) > 60
    for case in cases[:20]:  # the box holds what stands out from the corner's color
        y0, x0, y1, x1 = (round(64 * v) for v in case.box)
        assert images[case.scene, y0:y1, x0:x1].std() > 5
    with pytest.raises(UserError, match="names 0 classes of shapes; it must name one"):
        measure_heat_maps.class_of("a red dog")
    assert measure_heat_maps.class_of("a picture of a red circle") == "red circle"


def test_the_command_prints_chance_and_fails_below_the_bound(workdir, tmp_path, capsys):
    output = tmp_path / "figures.json"
    arguments = ["--workdir", str(workdir), "--scenes", "60", "--scenes-of-all", "4"]
    arguments += ["--methods", "patches+contrast,windows", "--json", str(output)]
    arguments += ["--text", "a pink circle"]
    assert measure_heat_maps.main([*arguments, "--at-least", "1.01"]) == 1
    said = capsys.readouterr()
    assert "never seen in training" in said.out and "less than 101.0%" in said.err
    found = json.loads(output.read_text())
    assert [row["method"] for row in found["one"]] == ["patches+contrast", "windows"]
    row = found["all"][0]
    assert 0.03 < row["chance"] < 0.25 and row["low"] <= row["share"] <= row["high"]
    assert f"{row['share']:.1%}" in said.out and f"{row['chance']:.1%}" in said.out
    assert measure_heat_maps.main([*arguments, "--methods", "saliency"]) == 2
    assert "unknown key 'saliency' in --methods" in capsys.readouterr().err

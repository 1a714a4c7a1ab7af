"""`vlp-jax look-inside` on a small run that was not trained."""

import numpy as np
import PIL.Image
import pytest
import runs

from tools import pointing_game
from vlp_jax.commands import look_inside


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


def test_a_run_plays_the_pointing_game(workdir):
    found = pointing_game.play(workdir, 4, ("patches+contrast", "windows"))
    assert 0.03 < found["chance"] < 0.25 and found["cases"] >= 4
    assert all(0 <= found[name] <= 1 for name in ("patches+contrast", "windows", "middle"))

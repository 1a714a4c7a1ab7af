"""A small model, a folder of pictures, and the page on both."""

import numpy as np
import PIL.Image
import pytest
import runs

import vlp_jax
from vlp_jax.serve.app import make_app
from vlp_jax.serve.explorer import Classes, Explorer
from vlp_jax.serve.index import Folder, build_index

COLORS = {"red": (220, 30, 30), "green": (30, 160, 60), "blue": (40, 70, 220), "grey": (128,) * 3}
NAMES = ("a red circle", "a blue box", "a Red box")


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("served")
    preprocess = {"lowercase": {}, "decode_image": {}, "resize": {"size": 24}}
    runs.write_run(runs.run_config(runs.CLIP, runs.SUBWORD, preprocess), workdir)
    return vlp_jax.load(workdir)


@pytest.fixture
def folder(tmp_path):
    """Four images in two folders, a file that is no image, and one with an odd name."""
    images = tmp_path / "images"
    (images / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number, (name, color) in enumerate(COLORS.items()):
        noise = rng.integers(-30, 30, (40, 60, 3))
        pixels = np.clip(np.asarray(color) + noise, 0, 255).astype(np.uint8)
        place = images / "more" if number % 2 else images
        PIL.Image.fromarray(pixels).save(place / f"{name}.png")
    (images / "broken.jpg").write_bytes(b"\xff\xd8 not much of an image")
    (images / "notes.txt").write_text("not looked at")
    odd = images / '<img src=x onerror="alert(1)">.png'
    PIL.Image.new("RGB", (30, 30), "white").save(odd)
    return images


@pytest.fixture
def explorer(encoder, folder, tmp_path):
    pictures = Folder(folder, limit=100)
    index = build_index(encoder, pictures, tmp_path / "index", lambda n: None, lambda line: None)
    classes = Classes.of_names("the classes", NAMES, ("{}", "my {}"))
    return Explorer(encoder, pictures, index, classes)


@pytest.fixture
def app(explorer):
    return make_app(explorer, ["localhost", "testserver"], max_upload=200_000)

"""The picture of a masked autoencoder's paintings, on a tiny run."""

import re
import types

import numpy as np
import pytest
from PIL import Image

from tools.perf import mae_then_clip
from vlp_jax import config as config_lib
from vlp_jax import evaluate
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.report.material import paint
from vlp_jax.train import train


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, shapes_dir):
    """A finished run of a masked autoencoder."""
    workdir = tmp_path_factory.mktemp("mae")
    config = config_lib.load(f"{mae_then_clip.CONFIG}:mae")
    train(smoke_lib.smoke(config), workdir, StartupClock())
    return workdir


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def test_the_three_views_are_of_the_images_of_the_evaluator(workdir):
    subject, loaded = evaluate.load_run(workdir)
    objective = subject.objective
    views = paint(subject, loaded, "reconstruction", 20)  # of two batches of 16
    true = np.concatenate(
        [b["image"][b["mask"]] for b in subject.open_evaluation_data("reconstruction").batches()]
    )[:20]
    assert views.shape == (20, 3, *true.shape[1:])
    seen, painted, shown = views.swapaxes(0, 1)
    np.testing.assert_allclose(shown, true / 255, atol=1e-5)
    same = (np.abs(painted - shown) < 1e-5).all(axis=(1, 2, 3))
    assert not same.any()
    grey = np.abs(seen - 0.5).max(axis=-1) < 1e-6
    size, (rows, columns) = objective.model.image.patch_size, objective.model.image.grid
    hidden = grey.reshape(20, rows, size, columns, size).all(axis=(2, 4))
    # At least as many as are hidden: a patch of the image may be of this grey itself.
    assert (hidden.sum(axis=(1, 2)) >= rows * columns - objective.kept).all()
    visible = ~np.repeat(np.repeat(hidden, size, axis=1), size, axis=2)
    assert visible.any()
    np.testing.assert_allclose(seen[visible], shown[visible], atol=1e-5)
    np.testing.assert_allclose(painted[visible], shown[visible], atol=1e-5)


def test_as_many_images_are_drawn_as_are_wanted(workdir, tmp_path):
    heights = []
    for count in (4, 8):
        output = tmp_path / f"{count}.png"
        mae_then_clip.draw_painted(workdir, output, count=count)
        heights.append(len(picture(output)))
    assert heights[1] > 1.4 * heights[0]  # two rows instead of one, and the titles


@pytest.mark.parametrize(
    ("folder", "more", "words"),
    [
        (".", {"evaluator": "painting"}, "no evaluator 'painting' (it has: reconstruction)"),
        (".", {"step": 1}, "has no checkpoint of step 1 (it has: 2)"),
        ("nothing", {}, "holds no run"),
    ],
)
def test_mistakes(workdir, tmp_path, folder, more, words):
    output = tmp_path / "x.png"
    with pytest.raises(UserError, match=re.escape(words)):
        mae_then_clip.draw_painted(workdir / folder, output, **more)
    assert not output.exists()


def test_an_objective_that_does_not_paint_is_refused():
    subject = types.SimpleNamespace(
        resources=types.SimpleNamespace(functions={"embed_image": None})
    )
    with pytest.raises(UserError, match="it is no masked autoencoder"):
        paint(subject, None, "reconstruction", 1)

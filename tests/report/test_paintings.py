"""The paintings of a masked autoencoder, on a tiny run."""

import types

import numpy as np
import pytest
import runs

from vlp_jax import config as config_lib
from vlp_jax import evaluate
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.report.material import paint


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, shapes_dir):
    """A masked autoencoder that was not trained."""
    workdir = tmp_path_factory.mktemp("mae")
    config = smoke_lib.smoke(config_lib.load("mae_then_clip:mae")).unlock()
    config.objective.image.update({"variant": "mu/8", "image_size": 24})
    for data in (config.data, config.evaluators.reconstruction.data):
        data.preprocess.resize.size = 24
    runs.write_run(config.lock(), workdir)
    return workdir


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


def test_an_evaluator_that_is_not_there_is_named(workdir):
    subject, loaded = evaluate.load_run(workdir)
    with pytest.raises(UserError, match=r"no evaluator 'painting' \(it has: reconstruction\)"):
        paint(subject, loaded, "painting", 4)


def test_an_objective_that_does_not_paint_is_refused():
    subject = types.SimpleNamespace(
        resources=types.SimpleNamespace(functions={"embed_image": None})
    )
    with pytest.raises(UserError, match="it is no masked autoencoder"):
        paint(subject, None, "reconstruction", 1)

"""tools.mae_then_clip and tools.show_reconstruction, end to end on tiny runs."""

import json
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tools import mae_then_clip, show_reconstruction
from vlp_jax import config as config_lib
from vlp_jax import evaluate
from vlp_jax.errors import UserError
from vlp_jax.training.init_from import REPORT

TARGET = 0.5
RUNS = (mae_then_clip.MAE, *mae_then_clip.LABELS)


def smoke(stage):
    return config_lib.smoke(config_lib.load(f"{mae_then_clip.CONFIG}:{stage}"))


@pytest.fixture(scope="module")
def done(tmp_path_factory, shapes_dir):
    """All that the command does, with its two configs as smoke tests."""
    output = tmp_path_factory.mktemp("runs")
    summary = mae_then_clip.run(output, smoke("mae"), smoke("clip"), TARGET)
    return types.SimpleNamespace(output=output, summary=summary)


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


# ------------------------------------------------------------------------ tools.mae_then_clip


def test_both_stages_run_and_the_second_starts_from_the_first(done):
    assert json.loads((done.output / "summary.json").read_text()) == done.summary
    assert done.summary["mae"]["steps"] == 2 and done.summary["mae"]["reconstruction_error"] > 0
    for name in mae_then_clip.LABELS:
        part = done.summary[name]
        assert part["steps"] == [2] and 0 <= part["zero_shot_top1"][0] <= 1
        assert part["step_seconds"] > 0
    for name in ("painted.png", "curves.png"):
        assert picture(done.output / name).std() > 1
    report = (done.output / "from_mae" / REPORT).read_text()
    fates = dict(line.split()[:: len(line.split()) - 1] for line in report.splitlines()[1:-1])
    assert {fate for path, fate in fates.items() if path.startswith("image/")} == {"loaded"}
    assert {fate for path, fate in fates.items() if path.startswith("decoder/")} == {"skipped"}
    assert fates["logit_scale"] == "fresh"
    assert not (done.output / "from_scratch" / REPORT).exists()
    told = mae_then_clip.report(done.summary)
    assert "from MAE      from scratch".replace(" ", "") in told.replace(" ", "")
    assert f"{done.summary['from_mae']['zero_shot_top1'][0]:.3f}" in told


def test_what_is_finished_is_not_run_again(done, capsys, monkeypatch):
    monkeypatch.setattr(mae_then_clip, "train", lambda *a: pytest.fail("a run was started"))
    clip = smoke("clip")
    with clip.unlocked():
        clip.seed = 1
    capsys.readouterr()
    again = mae_then_clip.run(done.output, smoke("mae"), clip, TARGET)
    out = capsys.readouterr().out
    assert [f"{done.output / name} is finished" in out for name in RUNS] == [True] * 3
    assert out.count("note: config.seed: 0 before, 1 now") == 2
    assert again == done.summary


def test_when_a_curve_gets_to_the_target():
    curve = ([25, 50, 75], [0.2, 0.7, 0.6])
    assert mae_then_clip.first_step(curve, 0.7) == 50
    assert mae_then_clip.first_step(curve, 0.71) is None
    part = {"steps": [25, 50], "zero_shot_top1": [0.2, 0.7], "step_seconds": 3.0}
    summary = {
        "target": 0.7,
        "mae": {"steps": 9, "reconstruction_error": 0.5, "step_seconds": 2.0},
        "from_mae": {**part, "reaches_target_at": 50},
        "from_scratch": {**part, "steps": [25, 75], "reaches_target_at": None},
    }
    lines = mae_then_clip.report(summary).splitlines()
    assert [line.split() for line in lines[2:5]] == [
        ["25", "0.200", "0.200"],
        ["50", "0.700", "-"],
        ["75", "-", "0.700"],
    ]
    assert lines[5:7] == [
        "from MAE: 0.7 is reached at step 50",
        "from scratch: 0.7 is never reached",
    ]


# ------------------------------------------------------------------- tools.show_reconstruction


def test_the_three_views_are_of_the_images_of_the_evaluator(done):
    parts, state = evaluate.load_run(epath.Path(done.output / "mae"))
    objective = parts.setup.objective
    views = show_reconstruction.paint(parts, state, "reconstruction", 20)  # of two batches of 16
    true = np.concatenate(
        [b["image"][b["mask"]] for b in parts.open_evaluation_data("reconstruction").batches()]
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


def test_the_command_draws_as_many_images_as_it_is_told(done, tmp_path, capsys):
    workdir, heights = str(done.output / "mae"), []
    for count in (4, 12):
        output = tmp_path / f"{count}.png"
        arguments = ["--workdir", workdir, "--output", str(output), "--images", str(count)]
        assert show_reconstruction.main(arguments) == 0
        heights.append(len(picture(output)))
        assert f"wrote {output}" in capsys.readouterr().out
    assert heights[1] > 1.8 * heights[0]  # three rows instead of one, and the titles


@pytest.mark.parametrize(
    ("run", "more", "words"),
    [
        ("from_scratch", [], "it is no masked autoencoder"),
        ("mae", ["--evaluator", "painting"], "no evaluator 'painting' (it has: reconstruction)"),
        ("mae", ["--step", "1"], "has no checkpoint of step 1 (it has: 2)"),
        ("nothing", [], "holds no run"),
    ],
)
def test_mistakes_of_the_command(done, tmp_path, capsys, run, more, words):
    output = tmp_path / "x.png"
    arguments = ["--workdir", str(done.output / run), "--output", str(output), *more]
    assert show_reconstruction.main(arguments) == 2
    assert words in capsys.readouterr().err and not output.exists()


def test_a_run_that_does_not_paint_is_refused_before_anything_is_drawn(done):
    parts, state = evaluate.load_run(done.output / "from_mae")
    with pytest.raises(UserError, match="no masked autoencoder"):
        show_reconstruction.paint(parts, state, "reconstruction", 1)

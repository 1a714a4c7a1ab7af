"""tools.perf.mae_then_clip, end to end on tiny runs."""

import json
import types

import numpy as np
import pytest
from etils import epath
from PIL import Image

from tools.perf import mae_then_clip
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.training.build import build
from vlp_jax.training.init_from import REPORT, match
from vlp_jax.training.matching import Source
from vlp_jax.training.param_groups import flatten

STAGES = ("mae", "clip")
RUNS = (mae_then_clip.MAE, *mae_then_clip.LABELS)


def smoke(stage):
    return smoke_lib.smoke(config_lib.load(f"{mae_then_clip.CONFIG}:{stage}"))


@pytest.fixture(scope="module")
def mae_and_clip(tmp_path_factory, shapes_dir):
    """All that the command does, on tiny runs: the folder `output`, and the `summary`."""
    output = tmp_path_factory.mktemp("runs")
    summary = mae_then_clip.run(output, smoke("mae"), smoke("clip"), target=0.5)
    return types.SimpleNamespace(output=output, summary=summary)


def picture(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.slow
def test_both_stages_run_and_the_second_starts_from_the_first(mae_and_clip):
    assert json.loads((mae_and_clip.output / "summary.json").read_text()) == mae_and_clip.summary
    mae = mae_and_clip.summary["mae"]
    assert mae["steps"] == 2 and mae["reconstruction_error"] > 0
    for name in mae_then_clip.LABELS:
        part = mae_and_clip.summary[name]
        assert part["steps"] == [2] and 0 <= part["zero_shot_top1"][0] <= 1
        assert part["step_seconds"] > 0
    for name in ("painted.png", "curves.png"):
        assert picture(mae_and_clip.output / name).std() > 1
    report = (mae_and_clip.output / "from_mae" / REPORT).read_text()
    fates = dict(line.split()[:: len(line.split()) - 1] for line in report.splitlines()[1:-1])
    assert {fate for path, fate in fates.items() if path.startswith("image/")} == {"loaded"}
    assert {fate for path, fate in fates.items() if path.startswith("decoder/")} == {"skipped"}
    assert fates["logit_scale"] == "fresh"
    assert not (mae_and_clip.output / "from_scratch" / REPORT).exists()
    told = mae_then_clip.report(mae_and_clip.summary)
    assert told.splitlines()[1].split() == ["steps", "from", "MAE", "from", "scratch"]
    assert f"{mae_and_clip.summary['from_mae']['zero_shot_top1'][0]:.3f}" in told


@pytest.mark.slow
def test_what_is_finished_is_not_run_again(mae_and_clip, capsys, monkeypatch):
    monkeypatch.setattr(mae_then_clip, "train", lambda *a: pytest.fail("a run was started"))
    clip = smoke("clip")
    with clip.unlocked():
        clip.seed = 1
    capsys.readouterr()
    again = mae_then_clip.run(
        mae_and_clip.output, smoke("mae"), clip, mae_and_clip.summary["target"]
    )
    out = capsys.readouterr().out
    assert [f"{mae_and_clip.output / name} is finished" in out for name in RUNS] == [True] * 3
    assert out.count("note: config.seed: 0 before, 1 now") == 2
    assert again == mae_and_clip.summary


@pytest.mark.slow
def test_a_run_that_does_not_paint_is_refused(mae_and_clip, tmp_path):
    with pytest.raises(UserError, match="it is no masked autoencoder"):
        mae_then_clip.draw_painted(mae_and_clip.output / "from_mae", tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_the_second_stage_takes_the_encoder_alone(tmp_path, shapes_dir):
    """By the rules of the config, on the shapes of both models; nothing is trained."""
    setups = {
        name: build(smoke(name), epath.Path(tmp_path), StartupClock()).setup for name in STAGES
    }
    shapes = {
        name: {path: leaf.shape for path, leaf in flatten(setup.abstract.params).items()}
        for name, setup in setups.items()
    }
    source = Source("the first stage", shapes["mae"], grids={}, notes=(), take=dict)
    fates = match(shapes["clip"], source, setups["clip"].config.init_from.rules)
    kinds = {"image": set(), "decoder": set(), "text": set()}
    for fate in fates:
        kinds.setdefault(fate.path.partition("/")[0], set()).add(fate.kind)
    assert kinds.pop("image") == {"loaded"} and kinds.pop("decoder") == {"skipped"}
    assert set().union(*kinds.values()) == {"fresh"}


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

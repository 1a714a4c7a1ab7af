"""tools.results on experiments that train nothing, and its own stages on small runs."""

import json
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from test_clip_folder import make_folder

from tools import experiments, pointing_game, results
from tools.experiments import EXPERIMENTS, Experiment, Figure, Stage
from tools.perf.peers import open_clip_training
from tools.pointing_game import Case
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.training.abstract_setup import abstract_setup
from vlp_jax.training.init_from import match
from vlp_jax.training.matching import Source
from vlp_jax.training.param_groups import flatten

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "debug_cpu.py")


@pytest.fixture
def calls(monkeypatch):
    """Folders in which a stage ran; its scores are functions of the seed."""
    ran = []

    def run(config, folder, source):
        ran.append((folder, source))
        score = config.optimizer.learning_rate + config.seed / 10
        return {"scores": {"top1": score, "chance": 0.1, "loss": score}, "loss": ((0, 9), (3, 2))}

    base, rate = Stage(CONFIG, run=run), "optimizer.learning_rate=0.5"
    stages = {"low": base, "high": Stage(CONFIG, (rate,), start="low", run=run)}
    figures = {
        "up": Figure("high", "top1", "chance", "low"),
        "down": Figure("high", "loss", 0.2, smaller=True),
    }
    monkeypatch.setitem(EXPERIMENTS, "fake", Experiment(stages, figures))
    return ran


def run(tmp_path, *arguments):
    folders = ["--output", str(tmp_path / "runs"), "--results", str(tmp_path / "results")]
    return results.main([*arguments, *folders])


def test_each_seed_runs_once_and_figures_stand_beside_chance_and_baseline(calls, tmp_path, capsys):
    assert run(tmp_path, "--only", "fake", "--seeds", "2", "--set", "log.every.steps=3") == 1
    said = capsys.readouterr()
    assert "run 2 of 4: high, seed 0; about 0 min left" in said.out
    # A loss of 0.55 is no better than 0.2.
    assert "error: fake: down: 0.5500 is no better than chance 0.2000" in said.err
    assert said.err.count("error") == 1
    low, high = (tmp_path / "runs" / name / "seed_0" for name in ("low", "high"))
    assert calls[:2] == [(low, None), (high, low)]
    found = json.loads((tmp_path / "results" / "fake.json").read_text())
    up = found["figures"]["up"]
    assert up["mean"] == pytest.approx(0.55) and up["std"] == pytest.approx(0.05 * 2**0.5)
    assert (up["seeds"], up["chance"]) == (2, 0.1)
    assert up["differences"] == pytest.approx([0.5 - (up["baseline"] - 0.05)] * 2)
    assert found["command"].startswith("python -m tools.results --only fake --seeds 2")
    assert found["stages"]["high"][1:] == ["optimizer.learning_rate=0.5", "log.every.steps=3"]
    assert "jax" in found["versions"] and found["commit"]
    run(tmp_path, "--only", "fake", "--seeds", "3")
    assert len(calls) == 6 and "is finished: it is not run again" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--only", "domo"], "unknown key 'domo' in --only"),
        (["--seeds", "0"], "--seeds must be at least 1"),
        (["--variant", "a", "seed=1"], "give --only NAME, or --config FILE"),
        (["--config", "demo"], "there is nothing to compare"),
        (["--config", "demo", "--variant", "a"], "--variant a changes nothing"),
        (["--config", "demo", *(["--variant", "a", "seed=1"] * 2)], "two of that name"),
        (["--config", "demo", "--variant", "a", "optimizer.nmae=adamw"], "unknown key 'nmae'"),
        (["--config", "demo", "--variant", "a", "objective.atention=xla"], "'atention'"),
        (["--config", "demo", "--variant", "a", "seed=1", "--score", "x/y"], "no such evaluator"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_score_that_runs_do_not_have_is_named(calls):
    with pytest.raises(UserError, match=r"the runs of low have no score y \(they have: x\)"):
        results.score_of({"low": [{"scores": {"x": 1.0}}]}, "low", "y")


def test_every_experiment_names_stages_that_are_there_and_evaluators_of_their_configs():
    for name, experiment in EXPERIMENTS.items():
        known = experiment.stages
        for figure in experiment.figures.values():
            assert {figure.stage, figure.baseline or figure.stage} <= set(known), name
        assert all(not stage.start or stage.start in known for stage in known.values())
        trained = {k: s for k, s in known.items() if s.run is experiments.train_and_score}
        configs = {key: config_lib.load(stage.config) for key, stage in trained.items()}
        figures = {k: f for k, f in experiment.figures.items() if f.stage in trained}
        results.check_scores(Experiment(trained, figures), configs)


def test_clip_takes_the_encoder_of_the_autoencoder_alone():
    """By the rules of the config, on the shapes of both models; nothing is trained."""
    shapes, configs = {}, {}
    for stage in ("mae", "clip"):
        config = configs[stage] = smoke_lib.smoke(config_lib.load(f"mae_then_clip:{stage}"))
        setup = abstract_setup(config, make_mesh({}, jax.devices()[:1]))
        params = flatten(setup.abstract.params)
        shapes[stage] = {path: leaf.shape for path, leaf in params.items()}
    source = Source("the first stage", shapes["mae"], grids={}, notes=(), take=dict)
    kinds = {"image": set(), "decoder": set(), "text": set()}
    for fate in match(shapes["clip"], source, configs["clip"].init_from.rules):
        kinds.setdefault(fate.path.partition("/")[0], set()).add(fate.kind)
    assert kinds.pop("image") == {"loaded"} and kinds.pop("decoder") == {"skipped"}
    assert set().union(*kinds.values()) == {"fresh"}


def test_the_end_of_a_loss_is_its_last_tenth_and_a_curve_is_smoothed_with_what_is_there():
    steps, losses = list(range(20)), [9.0] * 18 + [0.5, 1.5]
    assert experiments.end_of(steps, losses) == 1.0
    _, smooth = results.smoothed(steps, losses)
    np.testing.assert_allclose(smooth[:13], 9)
    np.testing.assert_allclose(smooth[13], (10 * 9 + 0.5) / 11)
    np.testing.assert_allclose(smooth[-1], (4 * 9 + 0.5 + 1.5) / 6)


@pytest.mark.slow
def test_settings_are_compared_by_seed(tmp_path, shapes_dir, capsys):
    arguments = ["--config", "demo", "--smoke", "--seeds", "1", "--score", "zero_shot/top1"]
    arguments += ["--variant", "same", "optimizer.name=muon"]
    assert run(tmp_path, *arguments) == 0
    found = json.loads((tmp_path / "runs" / "settings.json").read_text())["figures"]
    assert found["same: loss of the last 10%"]["differences"] == [0]
    assert (tmp_path / "runs" / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_stage_starts_from_the_weights_and_the_tokenizer_of_another(tmp_path, shapes_dir):
    assert run(tmp_path, "--only", "retrieval", "robustness", "--smoke", "--seeds", "1") == 0
    kept = [(tmp_path / "runs" / n / "seed_0") for n in ("demo", "retrieval")]
    texts = [(folder / "tokenizer.json").read_text() for folder in kept]
    assert texts[0] == texts[1] and "loaded" in (kept[1] / "init_from.txt").read_text()
    found = json.loads((tmp_path / "results" / "robustness.json").read_text())["figures"]
    assert 0 <= found["pgd_1"]["mean"] <= 1


def test_the_pointing_game_is_won_by_a_map_of_the_boxes():
    boxes = [(0.0, 0.5, 0.25, 1.0), (0.5, 0.0, 1.0, 0.25), (0.4, 0.4, 0.6, 0.6)]
    cases = [Case(n, "red circle", box) for n, box in enumerate(boxes)]
    maps = np.zeros((3, 8, 8))
    maps[0, 1, 4] = maps[1, 7, 1] = maps[2, 0, 0] = 1
    assert pointing_game.in_box(maps, cases).tolist() == [True, True, False]
    assert pointing_game.in_box(np.ones((3, 1, 1)), cases).tolist() == [False, False, True]


def test_cases_are_objects_that_are_alone_in_their_class():
    encoder = types.SimpleNamespace(images=lambda image, name: np.asarray(image))
    images, cases = pointing_game.read_cases(40, encoder)
    assert images.shape == (40, 64, 64, 3) and len({case.scene for case in cases}) > 30
    seen = [(case.scene, case.label) for case in cases]
    assert len(set(seen)) == len(seen) > 60
    for case in cases[:20]:  # the box holds what stands out from the corner's color
        y0, x0, y1, x1 = (round(64 * v) for v in case.box)
        assert images[case.scene, y0:y1, x0:x1].std() > 5


def test_weight_decay_of_open_clip_is_of_matrices_alone():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4))
    model.register_parameter("logit_scale", torch.nn.Parameter(torch.ones(())))
    plain, decayed = open_clip_training.decayed(model, 0.3)
    assert plain["weight_decay"] == 0 and len(plain["params"]) == 4
    assert decayed["weight_decay"] == 0.3 and decayed["params"][0] is model[0].weight


def test_open_clip_is_trained_with_adamw_alone():
    config = config_lib.load("clip_folder").unlock()
    config.optimizer.name = "muon"
    with pytest.raises(UserError, match=r"optimizer.name=adamw"):
        open_clip_training.checked(config)


@pytest.mark.slow
def test_open_clip_learns_from_the_same_batches(tmp_path):
    make_folder(tmp_path / "pictures", 300, (40, 80))
    config = config_lib.load("clip_folder")
    settings = [f"data.path={tmp_path}/pictures", "optimizer.name=adamw", "batch_size=32"]
    settings += ["log.every.steps=5", "duration.epochs=None", "duration.steps=60"]
    config_lib.override(config, [*settings, "tokenizer.vocab_size=400"])
    record = open_clip_training.train_and_judge(config)
    steps, losses = record["loss"]
    assert steps[0] == 0 and steps[-1] == 59 and record["scores"]["retrieval/pairs"] > 10
    assert np.mean(losses[-3:]) < losses[0] - 0.2

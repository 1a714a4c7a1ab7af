"""`tools.perf.compare_settings`: runs of several settings side by side."""

import json

import numpy as np
import pytest

from tools.perf import compare_settings, mae_then_clip
from vlp_jax import config as config_lib
from vlp_jax.data.shapes.records import SPECS
from vlp_jax.errors import UserError

SMALL = [
    "batch_size=16",
    "duration.steps=4",
    "log.every.steps=1",
    "objective.image.width=32",
    "objective.image.mlp_dim=64",
    "objective.text.width=32",
    "objective.text.mlp_dim=64",
    "objective.image.variant=Ti/16",
    "evaluators.zero_shot.every.percent=100.0",
    "evaluators.zero_shot.data.limit=32",
    *(f"evaluators.{name}=None" for name in ("zero_shot_unseen", "geometry", "retrieval")),
]


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "there is nothing to compare"),
        (["--variant", "a"], "--variant a changes nothing"),
        (["--variant", "a", "seed=1", "--variant", "a", "seed=2"], "two of that name"),
        (["--variant", "baseline", "seed=1"], "two of that name"),
        (["--variant", "a", "optimizer.nmae=adamw"], "unknown key 'nmae'"),
        (["--variant", "a", "objective.quantizaton=fp8"], "unknown key 'quantizaton'"),
        (["--variant", "a", "seed=1", "--score", "zeroshot/top1"], "has no such evaluator"),
    ],
)
def test_mistakes(tmp_path, capsys, arguments, message):
    assert compare_settings.main(["--output", str(tmp_path), *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


class Run:
    """The record of a run, without a folder."""

    path = "somewhere"

    def __init__(self, loss, top1):
        self.loss, self.top1 = loss, top1

    def curve(self, name):
        return list(range(20)), [9.0] * 18 + [self.loss - 0.5, self.loss + 0.5]

    def last_scores(self):
        return {"eval/zero_shot/top1": self.top1}, [20]


def test_differences_are_of_the_same_seed():
    records = {"baseline": [Run(1, 0.5), Run(3, 0.9)], "other": [Run(1.5, 0.5), Run(3.1, 0.5)]}
    summary = compare_settings.compare(records, ["zero_shot/top1"])
    loss, top1 = summary["other"].values()
    np.testing.assert_allclose(loss["values"], [1.5, 3.1])
    np.testing.assert_allclose(loss["differences"], [0.5, 0.1])
    np.testing.assert_allclose(top1["differences"], [0, -0.4])
    row = compare_settings.table(summary).splitlines()[-1]
    want = "| other | 2.3000 (+0.3000; +0.1000 to +0.5000) | 0.5000 (-0.2000; -0.4000 to +0.0000) |"
    assert row == want
    with pytest.raises(UserError, match=r"somewhere has none \(it has: zero_shot/top1"):
        compare_settings.compare(records, ["loss"])


def test_a_curve_is_smoothed_with_what_is_there():
    steps, smooth = compare_settings.loss_curve(Run(1, 0.5))
    assert list(steps) == list(range(20))
    np.testing.assert_allclose(smooth[:13], 9)
    np.testing.assert_allclose(smooth[13], (10 * 9 + 0.5) / 11)
    np.testing.assert_allclose(smooth[-1], (4 * 9 + 0.5 + 1.5) / 6)


@pytest.mark.slow
def test_runs_are_trained_once(tmp_path, shapes_dir, capsys):
    command = ["--output", str(tmp_path), "--set", *SMALL, "--score", "zero_shot/top1"]
    command += ["--seeds", "3", "--variant", "same", "optimizer.name=muon"]
    assert compare_settings.main(command) == 0
    capsys.readouterr()
    still = ["optimizer.learning_rate=0.0", "optimizer.muon.learning_rate=0.0"]
    assert compare_settings.main([*command, "--variant", "still", *still]) == 0
    printed = capsys.readouterr().out
    assert printed.count("is finished: it is not run again") == 2
    found = json.loads((tmp_path / "settings.json").read_text())["figures"]
    same, still = (found[name]["loss of the last 10%"] for name in ("same", "still"))
    assert same["differences"] == [0] and still["mean_difference"] > 0
    assert f"| same | {same['mean']:.4f} (+0.0000; +0.0000 to +0.0000) |" in printed
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("duration", "steps"),
    [
        ("duration.steps=7", 7),
        ("duration.examples=14", 7),
        ("duration.epochs=0.5", SPECS["tiny"].sizes["train"] // 4),
    ],
)
def test_a_finished_run_is_known_by_any_unit(duration, steps, tmp_path, shapes_dir):
    config = config_lib.load("configs/debug_cpu.py")
    config_lib.override(config, ["duration.steps=None", duration, "batch_size=2"])
    (tmp_path / "checkpoints" / str(steps - 1)).mkdir(parents=True)
    assert not mae_then_clip.is_finished(config, tmp_path)
    (tmp_path / "checkpoints" / str(steps)).mkdir()
    assert mae_then_clip.is_finished(config, tmp_path)

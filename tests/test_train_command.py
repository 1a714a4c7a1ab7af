"""The command as its user meets it: mistakes end in one line, a non-zero status and no half run."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from vlp_jax import evaluate, train
from vlp_jax.observe.jsonl import read_metrics

ROOT = Path(__file__).resolve().parent.parent
SMOKE = f"""
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib

def get_config(arg=None):
    config = smoke_lib.smoke(config_lib.load({str(ROOT / "configs")!r} + "/" + arg + ".py"))
    return config.unlock()
"""


ONE_EVALUATOR = [
    f"--config.evaluators.{name}=None" for name in ("zero_shot_unseen", "retrieval", "geometry")
]


@pytest.fixture
def command(tmp_path, shapes_dir, capsys):
    """Runs the command on a small form of a config: (status, last line of stderr)."""
    file = tmp_path / "configs" / "small.py"
    file.parent.mkdir()
    file.write_text(SMOKE)

    def run(*arguments, workdir=tmp_path / "run", config="demo"):
        status = train.main(["--config", f"{file}:{config}", "--workdir", str(workdir), *arguments])
        lines = capsys.readouterr().err.strip().splitlines()
        return status, lines[-1] if lines else ""

    return run


# One or two for each stage of a start; the others' messages have fast tests where they are made.
QUICK = ("misspelt key", "batch size", "dataset", "misspelt model key", "size of images")
QUICK += ("vocabulary", "evaluator", "folder of weights", "argument")
BAD = {
    "misspelt key": ("--config.optimizer.learning_rte=1", "did you mean 'learning_rate'"),
    "misspelt model key": ("--config.objective.image.widht=1", "did you mean 'width'"),
    "batch size": ("--config.batch_size=12", "config.batch_size 12 is not divisible by the 8"),
    "mesh": ("--config.mesh.replica=3", "does not fit the 8 devices"),
    "dataset": ("--config.data.dataset=shaeps/tiny", "shapes"),
    "split": ("--config.data.split=tranin", "train"),
    "source": ("--config.data.source=tdfs", "did you mean 'tfds'"),
    "loss": ("--config.objective.loss=softmx", "known: sigmoid, softmax"),
    "patch": ("--config.objective.image.image_size=15", "do not tile"),
    "heads": ("--config.objective.image.heads=5", "do not divide"),
    "size of images": ("--config.data.preprocess.resize.size=8", "pixels"),
    "vocabulary": ("--config.tokenizer.vocab_size=10", "vocab_size=10"),
    "optimizer": ("--config.optimizer.name=mouon", "did you mean 'muon'"),
    "duration": ("--config.duration=1", "a number with its unit, such as 40steps"),
    "checkpoint duration": ("--config.checkpoint.every.hours=1", "config.checkpoint.every"),
    "evaluator": ("--config.evaluators.retrieval.name=retreival", "did you mean 'retrieval'"),
    "frozen": ("--config.optimizer.frozen=['imge/.*']", "the whole path of no parameter"),
    "source of weights": ("--config.init_from.source=foo:BAR", "big_vision:FILE.npz"),
    "folder of weights": ("--config.init_from.source=/no/run", "folder /no/run does not exist"),
    "profile": ("--config.profile.first=1", "both first and last"),
    "argument": ("--confg=x", "unknown argument '--confg=x'"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x in QUICK else pytest.mark.slow) for x in BAD]
)
def test_a_mistake_is_one_line_and_leaves_nothing(command, tmp_path, name):
    argument, message = BAD[name]
    status, last = command(argument)
    assert status == 2
    assert last.startswith("error: ") and message in last, last
    assert not (tmp_path / "run").exists()


def test_unwritable_workdir(command, tmp_path):
    (tmp_path / "file").write_text("")
    status, last = command(workdir=tmp_path / "file" / "run")
    assert status == 2 and "cannot be written" in last and "choose another --workdir" in last
    status, last = command(workdir="/proc/run")
    assert status == 2 and "workdir /proc/run cannot be written" in last


def test_wandb_that_is_not_installed(command, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    status, last = command("--config.writers.wandb.enabled=True")
    assert status == 2 and "pip install wandb" in last
    assert not (tmp_path / "run").exists()


def test_folder_that_does_not_exist(tmp_path, capsys):
    config = str(ROOT / "configs" / "clip_folder.py")
    arguments = ["--config", config, "--workdir", str(tmp_path / "run")]
    assert train.main([*arguments, "--config.data.path=/no/such/folder"]) == 2
    assert "/no/such/folder" in capsys.readouterr().err
    assert train.main(arguments) == 2
    assert "path" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_checkpoint_of_another_model_stays_untouched(command, tmp_path, finished_run):
    shutil.copytree(finished_run, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    status, last = command("--config.objective.image.width=48")
    assert status == 2
    assert "params/image/" in last and "(16, 16)" not in last and "32" in last and "48" in last
    assert (tmp_path / "run" / "config.json").read_text() == before
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()


def test_nan_losses_end_the_run_name_their_examples_and_are_not_saved(command, tmp_path):
    unstable = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.clip_norm=0.0"]
    steps = ["--config.duration.steps=20", "--config.checkpoint.every.steps=1"]
    steps += ["--config.optimizer.warmup.percent=0.0"]
    status, last = command(*unstable, *steps, *ONE_EVALUATOR)
    assert status == 65
    assert "nan at step" in last or "inf at step" in last
    assert "the last of 5 that were skipped in a row" in last
    step = int(last.split("at step ")[1].split(",")[0])
    kept = sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept and max(kept) <= step - 4  # nothing was saved in the middle of them
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    sums = [r["train/loss"] + r["train/grad_norm"] for r in records if "train/loss" in r]
    assert not np.isfinite(sums[-1])
    [file] = (tmp_path / "run").glob("skipped-steps-*.jsonl")
    assert str(file) in last
    named = [json.loads(line) for line in file.read_text().splitlines()]
    assert [each["step"] for each in named] == list(range(step - 4, step + 1))
    assert all(len(each["examples"]["data"]) == 16 for each in named)


def test_a_finished_run_has_its_metrics_and_can_be_started_again_and_evaluated(
    command, tmp_path, capsys
):
    tensorboard = "--config.writers.tensorboard=True"
    assert command(tensorboard)[0] == 0
    keys = {key for r in read_metrics(tmp_path / "run" / "metrics.jsonl") for key in r}
    assert {
        "train/loss",
        "train/grad_norm",
        "train/learning_rate",
        "train/logit_scale",
        "eval/zero_shot/top1",
        "eval/zero_shot_unseen/top1",
        "eval/retrieval/image_to_text_r1",
        "eval/retrieval/text_to_image_r10",
        "perf/examples_per_second",
        "perf/mfu",
        "perf/data_wait_fraction",
    } <= keys
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    saved = json.loads((tmp_path / "run" / "config.json").read_text())
    assert saved["duration"]["steps"] == 2 and saved["writers"]["tensorboard"] is True
    first = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert command(tensorboard)[0] == 0
    again = read_metrics(tmp_path / "run" / "metrics.jsonl")
    scores = {k: v for r in first for k, v in r.items() if k.startswith(("train/", "eval/"))}
    assert scores == {k: v for r in again for k, v in r.items() if k in scores}
    output = tmp_path / "scores.json"
    workdir = str(tmp_path / "run")
    assert evaluate.main(["--workdir", workdir, "--output", str(output)]) == 0
    found = json.loads(output.read_text())
    assert found["step"] == 2
    for key, value in scores.items():
        if key.startswith("eval/"):
            assert found[key] == pytest.approx(value, abs=1e-6), key
    assert evaluate.main(["--workdir", workdir, "--step", "1"]) == 2
    assert "no checkpoint of step 1 (it has: 2)" in capsys.readouterr().err
    assert evaluate.main(["--workdir", workdir, "--params", "ema"]) == 2
    assert "holds no averaged parameters" in capsys.readouterr().err
    assert evaluate.main(["--workdir", workdir, "--evaluators", "retreival"]) == 2
    assert "did you mean 'retrieval'" in capsys.readouterr().err
    assert evaluate.main(["--workdir", str(tmp_path / "none")]) == 2
    assert "holds no run" in capsys.readouterr().err


@pytest.mark.slow  # tests/training/test_workdir.py has its parts
def test_a_workdir_may_be_relative(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command(*ONE_EVALUATOR, workdir="runs/mine")[0] == 0
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "2").is_dir()
    assert evaluate.main(["--workdir", "runs/mine"]) == 0


@pytest.mark.slow  # tests/training/test_init_from.py has its parts
def test_a_run_starts_from_another_and_then_goes_on_alone(command, tmp_path, capsys):
    first, second = tmp_path / "run", tmp_path / "second"
    assert command()[0] == 0
    source = f"--config.init_from.source={first}"
    assert command(source, workdir=second)[0] == 0
    report = (second / "init_from.txt").read_text()
    assert report.startswith(f"start from {first}, params of step 2")
    assert "fresh" not in report and "skipped" not in report
    shutil.rmtree(first)
    assert command(source, "--config.duration.steps=3", workdir=second)[0] == 0
    steps = [r["step"] for r in read_metrics(second / "metrics.jsonl") if "train/loss" in r]
    assert steps == [0, 1, 2]
    assert evaluate.main(["--workdir", str(second)]) == 0
    status, last = command(source, workdir=tmp_path / "third")
    assert status == 2 and f"the folder {first} does not exist" in last
    assert not (tmp_path / "third").exists()


def test_help_lists_the_keys_of_a_config(capsys):
    with pytest.raises(SystemExit) as stop:
        train.main(["--config", str(ROOT / "configs" / "demo.py"), "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--config.optimizer.learning_rate=" in text and "Exit status" in text
    assert "--config.objective.mask_ratio=0.0\n      share of each image's patches" in text

"""The evaluate command: checkpoints one by one, all, as they appear, and weights of others."""

import json
import os
import shutil
import signal
import threading

import jax
import numpy as np
import pytest

import vlp_jax
from vlp_jax import config as config_lib
from vlp_jax import evaluate, export
from vlp_jax.data.pipeline import TrainPipeline
from vlp_jax.encoders.subject import add_evaluators
from vlp_jax.observe.goodput import GOODPUT_FILE
from vlp_jax.observe.jsonl import read_metrics

NAME = "zero_shot"
TOP5 = f"eval/{NAME}/top5"


def command(*arguments):
    return evaluate.main([str(argument) for argument in arguments])


@pytest.fixture
def copy(workdir, tmp_path):
    """The run, to be written to."""
    shutil.copytree(workdir, tmp_path / "run")
    return tmp_path / "run"


def test_the_scores_are_those_of_the_run_without_its_training_data(workdir, tmp_path, monkeypatch):
    def refuse(*arguments, **more):
        raise AssertionError("the training data was opened")

    monkeypatch.setattr(TrainPipeline, "__init__", refuse)
    assert command("--workdir", workdir, "--output", tmp_path / "scores.json") == 0
    scores = json.loads((tmp_path / "scores.json").read_text())
    records = read_metrics(workdir / "metrics.jsonl")
    told = {k: v for r in records if r["step"] == 2 for k, v in r.items() if k.startswith("eval/")}
    assert scores.pop("step") == 2 and len(told) > 10
    assert scores == pytest.approx(told, rel=1e-4)


def test_other_devices_and_batches_change_nothing(workdir, capsys):
    usual = evaluate.evaluate(workdir, names=[NAME])
    subject = evaluate.Subject.of_run(
        workdir, names=[NAME], batch_size=24, overrides=["mesh.replica=2", "mesh.fsdp=4"]
    )
    assert subject.resources.mesh.shape["fsdp"] == 4 and list(subject.evaluators) == [NAME]
    assert evaluate.scores_of(subject, subject.load()) == pytest.approx(
        {k: v for k, v in usual.items() if k != "step"}, rel=1e-4
    )
    elsewhere = ["--config.mesh.replica=1024", "--evaluators", NAME, "--workdir", workdir]
    assert command(*elsewhere) == 0
    out = capsys.readouterr().out
    assert f"fit the {jax.device_count()} devices of this job" in out and TOP5 in out


def test_further_evaluators_of_a_config_of_ones_own(workdir, tmp_path, capsys):
    """Its data is its own: another split, without the limit of the run's."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from ml_collections import ConfigDict\n"
        "from vlp_jax.config import base\n"
        "def get_config(arg=None):\n"
        "    config = base()\n"
        "    mine = {'name': 'retrieval', 'ks': (1,), 'data': {'split': 'test', 'limit': 9}}\n"
        "    config.evaluators = ConfigDict({'mine': mine, 'zero_shot': mine})\n"
        "    return config\n"
    )
    added = "--config.evaluators.third={'name': 'geometry', 'data': {'split': 'test', 'limit': 5}}"
    arguments = ("--workdir", workdir, "--config", file, added)
    assert command(*arguments, "--evaluators", "mine,zero_shot,third") == 0
    told = dict(line.split() for line in capsys.readouterr().out.splitlines() if "eval/" in line)
    assert told["eval/mine/images"] == "9" == told["eval/zero_shot/images"]
    assert "eval/mine/image_to_text_r1" in told and "eval/third/pairs" in told


def test_the_data_of_further_evaluators_is_that_of_their_config():
    run, mine = config_lib.load("configs/demo.py"), config_lib.load("configs/clip_shapes.py")
    config_lib.override(run, ["data.limit=7", "data.where={'num_objects': 1}"])
    config_lib.override(mine, ["data.dataset=shapes/tiny", "evaluators.geometry=None"])
    add_evaluators(run, mine)
    data = run.evaluators.retrieval.data
    assert data.dataset == "shapes/tiny" and data.limit == 1000 and data.where is None
    assert "geometry" in run.evaluators and "knn" in run.evaluators and run.is_locked


def test_all_checkpoints_once(copy, capsys):
    arguments = ("--workdir", copy, "--evaluators", NAME)
    assert command(*arguments, "--all") == 0
    first = read_metrics(copy / evaluate.EVALUATIONS)
    assert [r["step"] for r in first] == [1, 2] and all(TOP5 in r for r in first)
    one = evaluate.evaluate(copy, 1, [NAME])
    assert one[TOP5] == pytest.approx(first[0][TOP5])
    capsys.readouterr()
    assert command(*arguments, "--all") == 0
    assert capsys.readouterr().out.count("was evaluated before") == 2
    assert read_metrics(copy / evaluate.EVALUATIONS) == first
    # Another evaluator adds its scores to what is there.
    assert command("--workdir", copy, "--evaluators", f"{NAME},zero_shot_unseen", "--all") == 0
    known = evaluate.known_scores(copy)
    assert {k.split("/")[1] for k in known[2]} == {NAME, "zero_shot_unseen"}


def test_following_a_run_until_it_is_complete(copy, capsys, monkeypatch):
    later, checkpoints = copy / "later", copy / "checkpoints"
    (checkpoints / "2").rename(later)
    ledger = json.loads((copy / GOODPUT_FILE).read_text())
    (copy / GOODPUT_FILE).write_text(json.dumps({**ledger, "ended": None}))
    monkeypatch.setattr(evaluate, "LOOK_SECONDS", 0.05)
    waited = threading.Event()
    monkeypatch.setattr(
        evaluate, "_say", lambda line, say=evaluate._say: (say(line), _note(line, waited))
    )

    def go_on():
        assert waited.wait(120)
        later.rename(checkpoints / "2")
        (copy / GOODPUT_FILE).write_text(json.dumps({**ledger, "ended": "complete"}))

    thread = threading.Thread(target=go_on)
    thread.start()
    assert command("--workdir", copy, "--evaluators", NAME, "--follow") == 0
    thread.join()
    assert [r["step"] for r in read_metrics(copy / evaluate.EVALUATIONS)] == [1, 2]
    assert "waiting for checkpoints" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_following_ends_well_when_it_is_told_to(copy, capsys, monkeypatch, number):
    """Scores that are there are kept, and none is computed here."""
    ledger = json.loads((copy / GOODPUT_FILE).read_text())
    (copy / GOODPUT_FILE).write_text(json.dumps({**ledger, "ended": None}))
    score = {f"eval/{NAME}/x": 1.0}
    lines = [json.dumps({"step": step, **score}) for step in (1, 2)]
    (copy / evaluate.EVALUATIONS).write_text("".join(f"{line}\n" for line in lines))

    def say(line):
        if line.startswith("waiting"):
            threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    monkeypatch.setattr(evaluate, "_say", say)
    assert command("--workdir", copy, "--evaluators", NAME, "--follow") == 0
    assert capsys.readouterr().err == ""


def _note(line, waited):
    if line.startswith("waiting"):
        waited.set()


def test_weights_of_others_are_judged_as_the_run_is(workdir, tmp_path, capsys):
    folder = tmp_path / "hf"
    arguments = ("--workdir", workdir, "--format", "hf", "--output", folder, "--no-verify")
    assert export.main([str(a) for a in arguments]) == 0
    run = evaluate.evaluate(workdir, names=[NAME])
    limited = "--config.evaluators.zero_shot.data.limit=20"
    sized = "--config.evaluators.zero_shot.data.preprocess.resize.size=32"
    for where in (("--workdir", workdir), ("--config", "configs/demo.py")):
        more = [] if where[0] == "--workdir" else [limited, sized]
        output = tmp_path / "scores.json"
        status = command(
            "--weights", f"hf:{folder}", *where, "--evaluators", NAME, "--output", output, *more
        )
        assert status == 0
        scores = json.loads(output.read_text())
        if not more:
            assert scores == pytest.approx({k: v for k, v in run.items() if k != "step"}, rel=1e-4)
        else:
            assert scores[f"eval/{NAME}/examples"] == 20
    arguments = ("--weights", f"hf:{folder}", "--config", "configs/demo.py", "--evaluators", NAME)
    assert command(*arguments) == 2
    assert "takes images of 32 x 32 pixels, and config.evaluators.zero_shot" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "say what is evaluated"),
        (("--workdir", "none"), "none holds no run"),
        (("--weights", "hf:none"), "needs evaluators"),
        (("--weights", "hf:none", "--workdir", "W"), "none does not exist"),
        (("--weights", "hf:x", "--workdir", "W", "--all"), "they have no steps"),
        (("--weights", "hf:x", "--workdir", "W", "--params", "ema"), "leave --params out"),
        (("--workdir", "W", "--tokenizer", "t.json"), "--tokenizer belongs to --weights"),
        (("--workdir", "W", "--step", "7"), "no checkpoint of step 7 (it has: 1, 2)"),
        (("--workdir", "W", "--evaluators", "zeroshot"), "did you mean 'zero_shot'"),
        (("--workdir", "W", "--batch-size", "3"), "--batch-size 3 is not divisible by"),
        (("--workdir", "W", "--stp", "3"), "unknown argument '--stp'"),
        (("--workdir", "W", "--config.evaluators.zero_shot.data.limt=3"), "limt"),
    ],
)
def test_mistakes_are_one_line(workdir, arguments, message, capsys):
    assert command(*(workdir if a == "W" else a for a in arguments)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error:")]
    assert message in line


@pytest.mark.parametrize("mixture", [False, True])
def test_prompts_go_through_the_text_operations_of_the_run(copy, mixture):
    config = json.loads((copy / "config.json").read_text())
    data = config["data"]
    data["preprocess"]["canonicalize_text"] = {}
    if mixture:
        keys = ("max_bad_fraction", "batch_ops", "order", "lanes", "window")
        part = {k: v for k, v in data.items() if k not in keys}
        config["data"] = {"source": "mixture", "parts": {"a": {**part, "weight": 1}}}
    section = config["evaluators"][NAME]
    section["templates"] = ["A photo_of {}!"]
    section["data"] = {**data, **section["data"]}
    config["evaluators"] = {NAME: section}
    (copy / "config.json").write_text(json.dumps(config))
    subject = evaluate.Subject.of_run(copy)
    found = subject.evaluators[NAME].class_embeddings(subject.load().params)
    model = vlp_jax.load(copy)
    shouted = [f"A PHOTO OF {name}" for name in subject.evaluators[NAME].class_names]
    np.testing.assert_allclose(found, model.embed_text(shouted), atol=1e-5)
    assert str(subject.resources.wording) == str(model.texts.preprocess) == "canonicalize_text"

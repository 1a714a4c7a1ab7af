"""The step benchmark: turns, ratios, our step on a fixed batch, and the whole command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import closed_forms
import jax
import numpy as np
import pytest
from rich.console import Console

from tools.perf import harness
from tools.perf import step as step_command
from tools.perf.jax_step import NOMINAL_EPOCH, JaxStep, Peak, compile_twice, fixed_batch
from tools.perf.peers.apart import ApartPeer
from tools.perf.result import Result, as_json, as_table, measure
from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import UserError
from vlp_jax.objectives.base import Context
from vlp_jax.observe.compilation import CompileWatch
from vlp_jax.parallel.mesh import make_mesh
from vlp_jax.training.abstract_setup import abstract_setup

ROOT = Path(__file__).resolve().parents[2]


class Scripted:
    """A contender with given times, that notes when it runs."""

    notes = ("it is not real",)

    def __init__(self, name, seconds, order):
        self.name, self.facts = name, {"compile_seconds": {"cold": 1.0}}
        self._seconds, self._order = iter(seconds), order

    def run(self, steps):
        self._order.append(self.name)
        second = next(self._seconds)
        return [second] * (steps - 1) + [100.0]  # something disturbed the last step


def test_turns_alternate_and_the_ratio_is_of_the_rounds():
    order = []
    ours = Scripted("ours", [1.0, 2.0, 4.0], order)
    peer = Scripted("peer", [3.0, 4.0, 16.0], order)
    seen = []
    each_round = lambda found: seen.append([len(one.rounds) for one in found])  # noqa: E731
    measured = measure([ours, peer], rounds=3, steps=4, each_round=each_round)
    assert seen == [[1, 1], [2, 2], [3, 3]]
    assert order == ["ours", "peer"] * 3
    found = measured[1].ratio
    assert found.rounds == (3.0, 2.0, 4.0) and found.median == 3.0
    assert measured[0].median == 3.0  # of 1, 1, 1, 2, 2, 2, 4, 4, 4 and three of 100


def test_the_next_step_is_started_before_this_one_is_waited_for():
    happened = []
    timer = harness.StepTimer(lambda result: happened.append(f"waited {result}"))
    for step in range(3):
        happened.append(f"started {step}")
        timer.started(step)
    assert len(timer.seconds()) == 3
    assert happened == [
        "started 0", "started 1", "waited 0", "started 2", "waited 1", "waited 2"
    ]  # fmt: skip


def test_figures_of_a_result():
    order = []
    contenders = [Scripted("ours", [0.5], order), Scripted("peer", [1.0], order)]
    measured = measure(contenders, rounds=1, steps=3)
    peak = Peak(8e12, 16e12, "bfloat16", 8192)
    result = Result(measured, 32, 2, 2e12, peak, {"other": "out of memory"})
    content = json.loads(json.dumps(as_json(result)))
    found = content["contenders"]["ours"]
    assert (found["examples_per_second"], found["mfu"]) == (64.0, 0.5)
    assert (found["mfu_of_data_sheet"], content["examples_per_device"]) == (0.25, 16)
    assert content["ours_over"]["peer"] == {"median": 2, "min": 2, "max": 2, "rounds": [2]}
    console = Console(width=150, record=True, file=open("/dev/null", "w"))
    console.print(as_table(result))
    text = console.export_text()
    for words in ("x 2.00", "peer: it is not real", "other: FAILED: out of memory", "50.0%"):
        assert words in text
    assert not result.beats_peak
    noisy = dataclasses.replace(result, peak=Peak(3e12, None, "float32", 2048))
    assert noisy.beats_peak and noisy.figures(measured[0])["mfu"] is None
    assert noisy.figures(measured[1])["mfu"] == pytest.approx(2 / 3)
    console.print(as_table(noisy))
    assert "noisy" in (text := console.export_text()) and "133" not in text


def test_our_step_is_the_one_that_trains():
    config = smoke_lib.smoke(config_lib.load("configs/bench_small.py"))
    step = JaxStep("ours", config, jax.devices()[:2])
    setup = step.setup
    params = jax.device_get(step._state.params)
    losses = []
    program = step.program
    step.program = lambda state, batch: losses.append(program(state, batch)) or losses[-1]
    assert len(step.run(3)) == 3
    assert int(step._state.step) == 3 and step.facts["devices"] == 2
    expected, _ = setup.objective.loss(params, step.batch, Context(jax.random.key(0)))
    total, count = losses[0][1]["loss"]
    np.testing.assert_allclose(total / count, expected, rtol=1e-5)
    forward = closed_forms.dual_encoder(setup.objective.model) + 2 * 16 * 32
    assert step.step_flops == pytest.approx(3 * 16 * forward)


@pytest.mark.parametrize("name", ["classify_shapes", "vqa_shapes", "mae_then_clip"])
def test_every_kind_of_objective_gets_a_batch(name):
    config = smoke_lib.smoke(config_lib.load(f"configs/{name}.py"))
    setup = abstract_setup(config, make_mesh({}, jax.devices()[:1]), NOMINAL_EPOCH)
    batch = fixed_batch(setup)
    assert {name: (x.shape, x.dtype) for name, x in batch.items()} == {
        name: (spec.shape, spec.dtype) for name, spec in setup.batch_spec.items()
    }


@pytest.mark.slow
def test_a_program_is_compiled_anew_and_from_the_cache():
    config = smoke_lib.smoke(config_lib.load("configs/mae_b16.py"))
    before = jax.config.jax_compilation_cache_dir
    setup = abstract_setup(config, make_mesh({}, jax.devices()[:1]), NOMINAL_EPOCH)
    with CompileWatch() as watch:
        _, found = compile_twice(setup)
    compiled = watch.so_far()
    assert found["from_cache"] and found["cold"] > 0 and found["warm"] > 0
    # Each program twice: not found the first time, found the second.
    assert compiled.programs == compiled.requests == 2 * compiled.hits > 0
    assert jax.config.jax_compilation_cache_dir == before


def command(*arguments, variables=None):
    code = (
        "import sys; from tools.perf import step; status = step.main(sys.argv[1:]); "
        "print('tensorflow' in sys.modules, 'torch' in sys.modules); sys.exit(status)"
    )
    env_path = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin", "HOME": "/tmp"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**env_path, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", **(variables or {})},
    )


TINY = [
    *("--config", "configs/bench_small.py", "--batch", "8", "--rounds", "2", "--steps", "2"),
    *(f"--config.objective.{t}.{k}={v}" for t in ("image", "text") for k, v in
      {"width": 16, "depth": 1, "mlp_dim": 16, "heads": 1}.items()),
    "--config.objective.embed_dim=16",
]  # fmt: skip


def test_the_command_needs_no_tensorflow_and_writes_what_it_found(tmp_path):
    file, folder = tmp_path / "step.json", tmp_path / "trace"
    done = command(*TINY, "--json", str(file), "--profile", str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "False False"
    found = json.loads(file.read_text())
    assert found["contenders"].keys() == {"ours"} and found["complete"]
    ours = found["contenders"]["ours"]
    assert (found["devices"], ours["devices"], found["examples_per_device"]) == (2, 2, 4)
    assert [len(turn) for turn in ours["all_step_seconds"]] == [2, 2]
    assert ours["compile_seconds"]["from_cache"] and ours["program_bytes"]["temporaries"] > 0
    assert found["versions"]["jax"] == jax.__version__ and found["command"].endswith(str(folder))
    assert found["config"]["objective"]["remat"] == "dots" and found["peak"]["measured"] > 0
    kernels = ours["profile"]["kernels"]
    assert any("dot_general" in k["what"] for k in kernels)
    known = sum(k["share"] for k in kernels if k["what"] != "?")
    assert known > 0.9 and not any(k["name"].startswith("while") for k in kernels)
    assert "dearest kernels" in done.stdout and "attributed to operations" in done.stdout


@pytest.mark.slow
def test_peers_apart_have_processes_of_their_own_as_they_come(tmp_path):
    file = tmp_path / "step.json"
    arguments = (*TINY, "--peer", "plain", "--apart", "--json", str(file))
    done = command(*arguments, variables={"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"})
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    plain = found["contenders"]["plain"]
    assert plain["devices"] == 1 and [len(turn) for turn in plain["all_step_seconds"]] == [2, 2]
    assert len(found["ours_over"]["plain"]["rounds"]) == 2
    assert plain["notes"][0] == (
        "in a process of its own, without GLIBC_TUNABLES, PJRT_NPROC, which ours has"
    )
    assert "one device" in plain["notes"][1]
    assert found["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"


def test_a_peer_apart_that_fails_says_why():
    code = "import sys; print('starting', file=sys.stderr); sys.exit('error: out of memory')"
    with pytest.raises(RuntimeError, match="ended with status 1: error: out of memory$"):
        ApartPeer("peer", [sys.executable, "-c", code])
    ready = "print(json.dumps({'notes': [], 'facts': {}}), flush=True); "
    code = f"import json, sys; {ready} input(); sys.exit(3)"
    with ApartPeer("peer", [sys.executable, "-c", code]) as peer:
        with pytest.raises(RuntimeError, match="ended with status 3"):
            peer.run(1)
        with pytest.raises(RuntimeError, match="ended with status 3"):
            peer.run(1)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--peer", "timm"], "error: --peer timm: it classifies images"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--config.objective.remta=full"], "remat"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, words, capsys, monkeypatch):
    # JAX has started: only what is refused before devices are looked for, or that needs none.
    monkeypatch.setattr(step_command, "start_jax", lambda arguments: jax.devices()[:1])
    assert step_command.main([*TINY, *arguments]) == 2
    assert words in capsys.readouterr().err


def test_more_devices_than_there_are(monkeypatch):
    arguments, _ = step_command.parse([*TINY, "--devices", "64"])
    monkeypatch.setattr(jax.config, "update", lambda *setting: None)
    with pytest.raises(UserError, match="--devices 64: there are"):
        step_command.start_jax(arguments)

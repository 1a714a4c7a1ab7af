"""tools.perf.loss as devices are added: both forms, and what it calls a fault."""

import functools
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from tools.perf import harness
from tools.perf import loss as loss_memory
from tools.perf.loss import Line
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.parallel import mesh as mesh_lib

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.perf.loss", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def test_the_blocked_form_keeps_its_memory_and_the_plain_form_does_not():
    small = ("--per-device", "16", "--dim", "32", "--block-size", "8")
    done = run("--devices", "4", "32", *small)
    assert done.returncode == 0, done.stderr
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines() if "|" in line]
    assert rows[0] == ["loss", "form", "4 devices", "32 devices"]
    ratios = {
        tuple(row[:2]): [float(cell.split("(")[1][:-3]) for cell in row[2:]] for row in rows[2:]
    }
    assert set(ratios) == {(n, f) for n in ("softmax", "sigmoid") for f in ("plain", "blocked")}
    for (_, form), values in ratios.items():
        assert values[0] == 1
        # The plain form holds its rows of the logits: as many as there are devices.
        assert max(values) < 1.1 if form == "blocked" else values[1] > 4


@pytest.mark.parametrize("name", ["softmax", "sigmoid"])
def test_in_blocks_memory_follows_the_part_of_the_batch_and_not_its_square(name):
    mesh = mesh_lib.make_mesh({"replica": 2}, jax.devices()[:2])

    def temporary(part, block_size):
        loss = functools.partial(blocked_loss, name, mesh=mesh, block_size=block_size)
        return loss_memory.temporary_bytes(loss, mesh, 2 * part, 8)

    assert temporary(1024, 64) < 2.2 * temporary(512, 64)
    assert temporary(1024, 1024) > 3 * temporary(512, 512)


def test_faults_are_a_blocked_form_that_grows_and_a_plain_form_that_does_not():
    good = [Line("softmax", "plain", (100, 800)), Line("softmax", "blocked", (100, 109))]
    assert loss_memory.growth_faults(good) == []
    assert loss_memory.growth_faults([Line("softmax", "blocked", (100, 112, 90))])
    assert loss_memory.growth_faults([Line("sigmoid", "plain", (100, 105))])
    # Nothing in a TPU's main memory, or too much for it from the beginning.
    assert Line("softmax", "blocked", (0, 0, 5)).ratios() == [1, 1, math.inf]
    assert Line("softmax", "plain", (math.inf, math.inf)).ratios() == [1, 1]


def test_the_command_fails_where_there_is_a_fault(monkeypatch, capsys):
    lines = [
        Line("softmax", "plain", (2**20, math.inf)),
        Line("softmax", "blocked", (2**20, 2**21)),
    ]
    monkeypatch.setattr(loss_memory, "measure_growth", lambda arguments, meshes: lines)
    monkeypatch.setattr(harness, "compile_on_cpu", lambda: None)
    monkeypatch.setattr(loss_memory.jax.config, "update", lambda *a: None)
    assert loss_memory.main(["--devices", "1", "2"]) == 1
    out = capsys.readouterr()
    assert "2.00 MiB (2.00 x)" in out.out and "does not fit" in out.out
    assert "the blocked form grows with the devices, to 2.00 x" in out.err


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--devices", "8"], "at least two rising numbers"),
        (["--devices", "8", "4"], "at least two rising numbers"),
        (["--dim", "0"], "--dim must be at least 1"),
        (["--block-size", "0"], "--block-size must be at least 1"),
        (["--topology", "no:such"], "topology 'no:such' does not exist"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, words, monkeypatch, capsys):
    monkeypatch.setattr(harness, "compile_on_cpu", lambda: None)
    monkeypatch.setattr(loss_memory.jax.config, "update", lambda *a: None)
    assert loss_memory.main(arguments) == 2
    assert words in capsys.readouterr().err

"""The script that measures on a GPU, as far as it can be tried without one."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tools.perf import step

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "tools" / "perf" / "gpu_suite.sh"


def suite(*arguments, **environment):
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        ["bash", SUITE, *arguments],
        capture_output=True,
        text=True,
        env={**kept, "PYTHON": sys.executable, **{k: str(v) for k, v in environment.items()}},
    )


def test_shellcheck_finds_nothing():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--external-sources", f"--source-path={ROOT}", SUITE]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_dry_run_prints_commands_that_can_be_parsed_and_fit_in_eight_minutes(tmp_path):
    done = suite("--dry-run", OUT=tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()  # as a real run does
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert all(line[0] == "timeout" for line in lines)
    benches = [line for line in lines if "tools.perf.step" in line]
    assert [Path(line[line.index("--config") + 1]).stem for line in benches] == [
        "siglip_b16", "siglip_b16", "mae_b16", "mae_l16", "clip_l14"
    ]  # fmt: skip
    for line in benches:
        arguments, config = step.parse(line[line.index("tools.perf.step") + 1 :])
        assert config.batch_size == arguments.batch and arguments.json.endswith(".json")
        assert config.optimizer.name == "adamw"  # as the peers have
    assert step.parse(benches[0][5:])[0].profile


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [(["--dry"], {"OUT": "x"}, "--dry-run prints"), ([], {}, "set OUT to a folder")],
)
def test_mistakes_are_told(arguments, environment, words):
    done = suite(*arguments, **environment)
    assert done.returncode != 0 and words in done.stderr


def test_it_goes_on_after_a_failure_and_names_what_failed(tmp_path):
    out = tmp_path / "out"
    python = tmp_path / "python"  # measurements of MAE fail, and one takes too long
    python.write_text(
        '#!/bin/sh\ncase "$*" in *mae_*) exit 3 ;; *clip_l14*) exec sleep 60 ;; *) exit 0 ;; esac\n'
    )
    python.chmod(0o755)
    done = suite(OUT=out, PYTHON=python, LIMIT=8, CPU=1)
    assert done.returncode == 1
    summary = (out / "summary.txt").read_text()
    failed = re.findall(r"FAILED: (\w+) \((.*)\)", summary)
    assert failed[:2] == [("mae_b16", "3"), ("mae_l16", "3")]
    assert failed[2][0] == "clip_l14" and "longer than" in failed[2][1]
    assert re.search(r"siglip_b16 +\d+ s  ok", summary)


def test_wheels_are_installed_without_an_index(tmp_path):
    done = suite("--dry-run", OUT=tmp_path, WHEELS=tmp_path)
    assert "no wheels in" in done.stderr
    (tmp_path / "some.whl").touch()
    done = suite("--dry-run", OUT=tmp_path, WHEELS=tmp_path)
    first = shlex.split(done.stdout.splitlines()[0])
    assert {"--no-index", "--no-deps", f"{tmp_path}/some.whl"} <= set(first)


@pytest.mark.slow
def test_the_whole_set_on_a_cpu_in_small(tmp_path):
    done = suite(OUT=tmp_path, CPU=1, LIMIT=1200, JAX_DISABLE_MOST_OPTIMIZATIONS=1)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    files = sorted(path.name for path in tmp_path.iterdir())
    names = ["clip_l14", "mae_b16", "mae_l16", "siglip_b16"]
    assert files == sorted([*(f"{name}.json" for name in names), "suite.log", "summary.txt"])
    assert len(files) <= 8
    peers = {"siglip_b16": {"plain", "open_clip"}, "clip_l14": {"open_clip"}}
    for name in names:
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["ours_over"].keys() == peers.get(name, {"transformers"})
        assert found["complete"] and not found["failed"]

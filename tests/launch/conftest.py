"""How these tests run the launchers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
LAUNCH = ROOT / "launch"
FAKE_TRAIN = Path(__file__).resolve().parent / "fake_train.py"


@pytest.fixture
def launcher(tmp_path):
    """A function that runs launch/NAME with arguments and gives the finished process."""

    def run(name, *arguments, check=True, env=None, **kwargs):
        done = subprocess.run(
            [str(LAUNCH / name), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=60,
            env={**os.environ, **(env or {})},
            **kwargs,
        )
        if check:
            assert done.returncode == 0, done.stderr
        return done

    return run


@pytest.fixture
def fake_environment():
    """The environment in which launchers start tests/launch/fake_train.py, by the real Python."""
    python = os.path.realpath(sys.executable)  # without the start-up cost of an environment
    return {**os.environ, "VLP_TRAIN_COMMAND": f"{python} -I -S {FAKE_TRAIN}"}

"""Two runs do not share a workdir."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.training.workdir import locked

ROOT = Path(__file__).resolve().parent.parent.parent
HOLD = """
import sys, time
from etils import epath
from vlp_jax.training.workdir import locked
with locked(epath.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_second_is_refused_and_told_who_is_first(tmp_path):
    workdir = epath.Path(tmp_path / "run")
    with (
        locked(workdir),
        pytest.raises(UserError, match=f"in use by another run .process {os.getpid()} on"),
        locked(workdir),
    ):
        pass
    with locked(workdir):
        pass


def test_the_lock_ends_with_a_process_that_is_killed(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT
    )
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(UserError, match=f"process {process.pid} "), locked(epath.Path(tmp_path)):
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    with locked(epath.Path(tmp_path)):
        pass

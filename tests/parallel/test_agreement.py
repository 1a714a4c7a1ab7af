"""What several processes tell each other on the host."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel import agreement

ROOT = Path(__file__).resolve().parent.parent.parent
PROGRAM = """
import sys, threading, time
import jax
from vlp_jax.errors import CannotSave
from vlp_jax.parallel import agreement, startup

port, me = sys.argv[1], int(sys.argv[2])
startup.initialize(f"127.0.0.1:{port}", 2, me, expected=2)

assert agreement.gather({"me": me}) == [{"me": 0}, {"me": 1}]
assert agreement.from_first(me + 5) == 5
calls = []
assert agreement.on_first(lambda: calls.append(me) or "told") == "told"
assert calls == ([0] if me == 0 else [])
def cannot_save():
    raise CannotSave("no disk")
try:
    agreement.on_first(cannot_save)
except CannotSave as error:  # not a mistake of the user, which would not be started again
    assert error.status == 74 and str(error) == "process 0: no disk", error
else:
    raise AssertionError("nobody was told")
for number in range(20):
    assert agreement.gather(number) == [number, number]

barrier = agreement.Barrier()
if me == 0:
    time.sleep(0.5)
barrier(key="meet", timeout_ms=100000)
barrier(key="meet", timeout_ms=100000)  # a name may come again
look = agreement._is_set
if me == 1:  # so slow that the other has come, passed and gone on between two looks
    agreement.BARRIER_LOOK_MS = 1
    agreement._is_set = lambda *of: time.sleep(2) or look(*of)
else:
    time.sleep(1)
barrier(key="pass", timeout_ms=10000)
agreement._is_set, agreement.BARRIER_LOOK_MS = look, 500
barrier.renew()
began = time.monotonic()
if me == 1:
    barrier.fail("full")
else:
    try:
        barrier(key="written", timeout_ms=60000)
    except RuntimeError as error:
        assert "another process failed" in str(error)
    else:
        raise AssertionError("waited in vain for nothing")
    assert time.monotonic() - began < 50
agreement.gather(None)
barrier.renew()
barrier(key="written", timeout_ms=100000)  # forgotten
try:
    if me == 0:
        barrier(key="alone", timeout_ms=300)
except TimeoutError as error:
    assert "process 1 did not come to alone" in str(error)
agreement.gather(None)
print("done", startup.describe_processes("test"))
"""


def test_two_processes(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, port, str(index)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    for process in processes:
        output = process.communicate(timeout=120)[0]
        assert process.returncode == 0, output
        assert "done 2 processes, found by: test\n     0  " in output
        assert output.rstrip().endswith("1 x cpu")


def test_one_process_needs_nobody():
    assert agreement.gather(3) == [3] and agreement.from_first("a") == "a"
    assert agreement.on_first(lambda: 7) == 7
    agreement.Barrier()(key="x", timeout_ms=1)

    def fails():
        raise UserError("as it is")

    with pytest.raises(UserError, match="^as it is$"):
        agreement.on_first(fails)

"""A process that hangs is ended, and says where; one that works is left alone."""

import subprocess
import sys
import textwrap
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent

HEAD = """
import os, threading, time
from vlp_jax.observe.watchdog import Watchdog
"""


def run(tmp_path, body, **kwargs):
    code = HEAD + textwrap.dedent(body).replace("DIR", repr(str(tmp_path)))
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60, **kwargs
    )


def test_a_step_that_hangs_ends_the_process_and_tells_where(tmp_path):
    done = run(
        tmp_path,
        """
        def stuck_in_here():
            threading.Event().wait()

        with Watchdog(60, 0.5, 60, DIR) as dog:
            dog.beat()
            stuck_in_here()
        """,
    )
    assert done.returncode == 70
    assert "stuck_in_here" in done.stderr
    last = done.stderr.strip().splitlines()
    assert any("error: watchdog: a step took over 0 s" in line or "0.5" in line for line in last)
    [kept] = tmp_path.glob("stacks-*.txt")
    assert "stuck_in_here" in kept.read_text()


def test_the_first_step_and_pauses_have_more_time(tmp_path):
    done = run(
        tmp_path,
        """
        with Watchdog(60, 0.4, 60, DIR) as dog:
            time.sleep(0.8)  # the first step
            dog.beat()
            with dog.patient("evaluation"):
                time.sleep(0.8)
            for _ in range(8):
                time.sleep(0.1)
                dog.beat()
        print("alive")
        """,
    )
    assert done.returncode == 0 and done.stdout == "alive\n", done.stderr
    assert not list(tmp_path.iterdir())


def test_a_pause_that_hangs_is_named(tmp_path):
    done = run(
        tmp_path,
        """
        with Watchdog(60, 60, 0.3, DIR) as dog, dog.patient("evaluation"):
            threading.Event().wait()
        """,
    )
    assert done.returncode == 70 and "watchdog: evaluation took" in done.stderr


def test_time_in_which_the_process_was_stopped_counts(tmp_path):
    code = HEAD + textwrap.dedent(
        f"""
        with Watchdog(60, 1.0, 60, {str(tmp_path)!r}) as dog:
            dog.beat()
            print("ready", flush=True)
            threading.Event().wait()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=ROOT
    )
    process.stdout.readline()
    process.send_signal(19)  # SIGSTOP
    time.sleep(1.5)
    began = time.monotonic()
    process.send_signal(18)  # SIGCONT
    assert process.wait(timeout=30) == 70
    assert time.monotonic() - began < 10


def test_the_system_ends_what_python_cannot(tmp_path):
    """A call that hangs and holds the interpreter's lock: no thread of Python runs any more."""
    done = run(
        tmp_path,
        """
        import ctypes
        with Watchdog(60, 0.4, 60, DIR) as dog:
            dog.beat()
            time.sleep(0.1)
            ctypes.PyDLL(None).sleep(30)  # PyDLL keeps the lock
        """,
    )
    assert done.returncode == 1 and "Timeout" in done.stderr

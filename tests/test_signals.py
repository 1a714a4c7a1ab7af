"""SIGTERM and Ctrl-C: one line and status 75 at every moment, or a note to whoever saves."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from vlp_jax import signals

ROOT = Path(__file__).resolve().parent.parent
BOTH = [signal.SIGTERM, signal.SIGINT]
# Holds the main thread within one call that no handler of Python's comes into, as compiling does.
WITHIN_A_CALL = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'', b'', 1 << 30)"
PROGRAMS = {
    "imports": "say(); time.sleep(60)",
    "a command": "with signals.heard():\n    say(); time.sleep(60)",
    "a call that takes long": f"""
signals.STOP_SECONDS = 0.3
with signals.heard():
    say(); {WITHIN_A_CALL}""",
    "an exception that is swallowed": """
signals.STOP_SECONDS = 0.3
with signals.heard():
    try:
        say(); time.sleep(60)
    except BaseException:
        time.sleep(60)""",
    "a destructor": """
class Slow:
    def __del__(self):
        say(); time.sleep(0.5)
with signals.heard():
    x = Slow(); del x
    time.sleep(60)""",
    "threads that do not end": """
signals.STOP_SECONDS = 0.3
import threading
threading.Thread(target=time.sleep, args=(60,)).start()
with signals.heard():
    say(); time.sleep(60)""",
}
# What a command does, without its imports.
FRAME = """
import sys, time
from vlp_jax import signals
signals.listen()
def say():
    print("now", flush=True)
def command():
{}
try:
    command()
except KeyboardInterrupt as stop:
    print(stop, file=sys.stderr)
    signals.leaving(75)
    sys.exit(75)
"""


def started(program):
    """Starts a program and waits until it says that it is there."""
    process = subprocess.Popen(
        # Later versions of Python warn of a fork beside threads.
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "now\n", process.communicate()
    return process


def ended(process, seconds=10):
    """Exit status and what it has said."""
    try:
        errors = process.communicate(timeout=seconds)[1]
    finally:
        process.kill()
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("moment", PROGRAMS)
def test_one_line_and_the_status_of_a_stop(moment, number):
    body = "".join(f"    {line}\n" for line in PROGRAMS[moment].strip().splitlines())
    process = started(FRAME.format(body))
    process.send_signal(number)
    status, [line] = ended(process)
    assert status == 75
    assert line == f"told to stop ({signals.TOLD_BY[number]}): run the same command to go on"


NOTED = """
import sys, time
from vlp_jax import signals
signals.AGAIN_SECONDS = 0.3
with signals.heard(), signals.noted() as told:
    print("now", flush=True)
    told.wait()
    time.sleep(1.5)
    print("saved")
    signals.leaving(0)
"""


@pytest.mark.parametrize("number", BOTH)
@pytest.mark.parametrize("after", [None, 0.0, 0.7])
def test_a_second_signal_while_it_saves(number, after):
    """SIGTERM says nothing new; Ctrl-C twice at once is one; later it is a wish to leave."""
    process = started(NOTED)
    process.send_signal(number)
    if after is not None:
        time.sleep(after)
        process.send_signal(number)
    output, _ = process.communicate(timeout=10)
    leaves = number == signal.SIGINT and after
    assert (process.returncode, output) == ((75, "") if leaves else (0, "saved\n"))


def test_a_command_that_is_through_keeps_its_status():
    program = """
import time
from vlp_jax import signals
with signals.heard():
    signals.leaving(65)
print("now", flush=True)
time.sleep(60)
"""
    process = started(program.replace("with", "signals.listen()\nwith", 1))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (65, [])


def test_a_child_does_not_speak_for_its_parent():
    """A worker that is ended by SIGTERM, as pools end theirs, is no stop of the run."""
    program = """
import os, signal, sys, time
from vlp_jax import signals
with signals.heard(), signals.noted() as told:
    child = os.fork()
    if not child:
        time.sleep(60)
    time.sleep(0.2)
    os.kill(child, signal.SIGTERM)
    assert os.waitpid(child, 0)[1] == signal.SIGTERM  # it died of it
    assert not told.wait(0.3)
    print("now", flush=True)
    signals.leaving(0)
"""
    assert ended(started(program)) == (0, [])


@pytest.mark.parametrize(
    ("option", "command"),
    [
        ("-m", "vlp_jax.train"),
        ("-um", "vlp_jax.train"),
        ("-m", "vlp_jax.export"),
        ("-m", "vlp_jax.serve"),
        ("-m", "tools.plan"),
    ],
)
def test_commands_listen_before_they_import_what_takes_long(option, command):
    """The module is replaced by one that waits: where it is, nothing else was imported."""
    program = f"""
import importlib.abc, importlib.util, runpy, sys, time
def wait(name, *_):
    if name == {command!r}:
        print("now", flush=True)
        time.sleep(60)
sys.meta_path.insert(0, type("Wait", (), {{"find_spec": staticmethod(wait)}}))
sys.argv, sys.orig_argv = ["-m"], ["python", {option!r}, {command!r}]
runpy.run_module({command!r})
"""
    process = started(program)
    process.send_signal(signal.SIGINT)
    status, lines = ended(process)
    assert status == 75 and lines == ["told to stop (Ctrl-C): run the same command to go on"]


@pytest.mark.parametrize("argv", [["-m", "pytest"], ["-c"], ["-m", "vlp_jaxes.train"], ["x.py"]])
def test_a_program_that_imports_the_package_is_left_alone(argv, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv[:1])
    monkeypatch.setattr(sys, "orig_argv", ["python", *argv])
    before = [signal.getsignal(number) for number in BOTH]
    signals.listen_if_started("vlp_jax")
    assert [signal.getsignal(number) for number in BOTH] == before


@pytest.mark.parametrize("number", BOTH)
def test_in_somebody_elses_program_handlers_are_back_after_the_first(number):
    before = [signal.getsignal(each) for each in BOTH]
    with signals.noted() as told, signals.interruptible():
        assert not told.is_set()
        os.kill(os.getpid(), number)
        assert told.wait(5)
        assert [signal.getsignal(each) for each in BOTH] == before
    with signals.heard(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert [signal.getsignal(each) for each in BOTH] == before


@pytest.mark.parametrize("told_before", [True, False])
def test_what_need_not_be_finished_is_left_and_what_follows_is_not(told_before):
    with signals.heard(), signals.noted() as told:
        if told_before:
            os.kill(os.getpid(), signal.SIGTERM)
            assert told.wait(5)
        with pytest.raises(KeyboardInterrupt), signals.interruptible():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)  # it saves, say
        assert told.wait(5)


def test_another_thread_has_no_signals_to_hear():
    found = []

    def run():
        with signals.heard():
            found.append(signals._listener)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [None]

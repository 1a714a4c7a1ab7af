import os
import signal

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.errors import UserError
from vlp_jax.observe.profiler import Profiler, TraceSignal, parse_steps


@pytest.fixture
def traces(monkeypatch):
    """Records what the profiler asks of jax.profiler."""
    calls = []
    monkeypatch.setattr(
        jax.profiler, "start_trace", lambda path, **_: calls.append(("start", path))
    )
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def test_traces_the_steps_asked_for(traces, tmp_path):
    seen = []
    with Profiler((3, 5), tmp_path) as profiler:
        for step in range(10):
            profiler.step(step)
            seen.append(len(traces))
    assert traces == [("start", str(tmp_path)), ("stop",)]
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_a_resume_within_the_steps_traces_the_rest(traces, tmp_path):
    with Profiler((3, 5), tmp_path) as profiler:
        profiler.step(4)
        assert traces == [("start", str(tmp_path))]


def test_an_early_end_or_a_failure_closes_the_trace_once(traces, tmp_path):
    with pytest.raises(RuntimeError), Profiler((1, 5), tmp_path) as profiler:
        profiler.step(1)
        profiler.step(2)
        raise RuntimeError
    assert [call[0] for call in traces] == ["start", "stop"]
    profiler.close()
    assert len(traces) == 2


def test_steps_of_one_program_are_traced_together(traces, tmp_path):
    said = []
    with Profiler((8, 11), tmp_path, say=said.append) as profiler:
        for step in (4, 8):  # the run ends with the second program
            profiler.step(step, count=4)
    assert "trace of steps 8 to 11" in said[-1]


def test_nothing_is_traced_outside(traces, tmp_path):
    with Profiler((30, 50), tmp_path) as profiler:
        for step in range(10):
            profiler.step(step)
    assert traces == []


def test_swapped_steps_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="last step 2"):
        Profiler((3, 2), tmp_path)


def test_a_real_trace_is_written_and_names_the_steps(tmp_path):
    increment = jax.jit(lambda x: x + 1)
    x = increment(jnp.ones(8))
    with Profiler((1, 2), tmp_path) as profiler:
        for step in range(4):
            profiler.step(step, wait_for=x)
            x = increment(x)
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"step_num" in trace.read_bytes()


def test_without_steps_nothing_is_traced(tmp_path):
    with Profiler(None, tmp_path) as profiler:
        profiler.step(0, wait_for=None)
    assert list(tmp_path.iterdir()) == []


class Steps:
    """A run of steps with a profiler that takes a signal, and what it says."""

    def __init__(self, steps, directory, **options):
        self.signal = TraceSignal()
        self.said = []
        self.profiler = Profiler(
            steps, directory, requested=self.signal.take, say=self.said.append, **options
        )

    def run(self, count, signals=(), wait_for=()):
        with self.signal, self.profiler:
            for step in range(count):
                for _ in range(signals.count(step)):
                    os.kill(os.getpid(), signal.SIGUSR1)
                self.profiler.step(step, wait_for)


def kinds(traces):
    return [call[0] for call in traces]


def test_a_signal_traces_the_next_steps(traces, tmp_path):
    steps = Steps(None, tmp_path, steps_on_request=2)
    steps.run(10, signals=[3, 7])
    assert kinds(traces) == ["start", "stop"] * 2
    assert steps.said[0] == "tracing steps 3 to 4"
    assert steps.said[1].startswith(f"trace of steps 3 to 4 in {tmp_path}: ")
    assert "xprof" in steps.said[1] and "perfetto" in steps.said[1]
    assert steps.said[3].startswith("trace of steps 7 to 8")


def test_signals_that_come_twice_or_in_a_trace_are_one(traces, tmp_path):
    steps = Steps((5, 6), tmp_path, steps_on_request=2)
    steps.run(10, signals=[0, 0, 1, 6])
    assert kinds(traces) == ["start", "stop"] * 2
    dropped = "a trace is being taken already: the signal is dropped"
    assert [line.startswith("tracing steps") for line in steps.said].count(True) == 2
    assert steps.said.count(dropped) == 2


def test_a_signal_at_the_end_and_before_and_after_is_harmless(traces, tmp_path):
    steps = Steps(None, tmp_path)
    before = signal.getsignal(signal.SIGUSR1)
    with steps.signal:
        os.kill(os.getpid(), signal.SIGUSR1)  # during the start, say: the first steps are traced
        with steps.profiler:
            for step in range(3):
                steps.profiler.step(step)
        os.kill(os.getpid(), signal.SIGUSR1)  # nothing is left to trace
    assert kinds(traces) == ["start", "stop"]
    assert steps.said[-1].startswith("trace of steps 0 to 2 in")
    assert signal.getsignal(signal.SIGUSR1) == before


def test_it_waits_for_the_devices_where_the_trace_begins_and_ends(traces, tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "block_until_ready", lambda state: traces.append(("wait", state)))
    with Profiler((2, 3), tmp_path) as profiler:
        for step in range(6):
            profiler.step(step, wait_for=f"state {step}")
    assert traces == [("wait", "state 2"), ("start", str(tmp_path)), ("wait", "state 4"), ("stop",)]


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_trace_that_cannot_be_taken_ends_no_run(traces, tmp_path, monkeypatch, broken):
    def full(*_, **options):
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(jax.profiler, broken, full)
    steps = Steps((2, 4), tmp_path)
    steps.run(8)
    assert steps.said[-1] == "warning: no trace of steps 2 to 4: No space left on device"
    assert len([line for line in steps.said if "warning" in line]) == 1


def test_the_flag():
    assert parse_steps("10:15") == (10, 15)
    for text in ("10", "10-15", "a:b", "10:", "-1:5", "15:10"):
        with pytest.raises(UserError):
            parse_steps(text)

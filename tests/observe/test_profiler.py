import jax
import jax.numpy as jnp
import pytest

from vlp_jax.errors import UserError
from vlp_jax.observe.profiler import NullProfiler, Profiler


@pytest.fixture
def traces(monkeypatch):
    """Records what the profiler asks of jax.profiler."""
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda path: calls.append(("start", path)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append(("stop",)))
    return calls


def test_traces_the_steps_asked_for(traces, tmp_path):
    seen = []
    with Profiler(3, 5, tmp_path) as profiler:
        for step in range(10):
            profiler.step(step)
            seen.append(len(traces))
    assert traces == [("start", str(tmp_path)), ("stop",)]
    assert seen == [0, 0, 0, 1, 1, 1, 2, 2, 2, 2]


def test_a_resume_within_the_steps_traces_the_rest(traces, tmp_path):
    with Profiler(3, 5, tmp_path) as profiler:
        profiler.step(4)
        assert traces == [("start", str(tmp_path))]


def test_an_early_end_or_a_failure_closes_the_trace_once(traces, tmp_path):
    with pytest.raises(RuntimeError), Profiler(1, 5, tmp_path) as profiler:
        profiler.step(1)
        profiler.step(2)
        raise RuntimeError
    assert [call[0] for call in traces] == ["start", "stop"]
    profiler.close()
    assert len(traces) == 2


def test_nothing_is_traced_outside(traces, tmp_path):
    with Profiler(30, 50, tmp_path) as profiler:
        for step in range(10):
            profiler.step(step)
    assert traces == []


def test_swapped_steps_are_a_user_error(tmp_path):
    with pytest.raises(UserError, match="last step 2"):
        Profiler(3, 2, tmp_path)


def test_a_real_trace_is_written_and_names_the_steps(tmp_path):
    increment = jax.jit(lambda x: x + 1)
    x = increment(jnp.ones(8))
    with Profiler(1, 2, tmp_path) as profiler:
        for step in range(4):
            profiler.step(step, wait_for=x)
            x = increment(x)
    (trace,) = tmp_path.glob("plugins/profile/*/*.xplane.pb")
    assert b"step_num" in trace.read_bytes()


def test_null_profiler():
    with NullProfiler() as profiler:
        profiler.step(0, wait_for=None)
    profiler.close()

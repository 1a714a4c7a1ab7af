import pytest

from vlp_jax.observe.stragglers import ProcessSpeed, StragglerWatch, spread, straggler


def quick(number):
    return ProcessSpeed(f"host{number}", 1.0, 0.01, 0.95)


SLOW_DATA = ProcessSpeed("hostD", 1.02, 0.60, 0.36)
BUSY = ProcessSpeed("hostB", 0.98, 0.01, 0.50)


def test_spread():
    assert spread([quick(0), SLOW_DATA, BUSY]) == {
        "perf/step_seconds_min": 0.98,
        "perf/step_seconds_max": 1.02,
        "perf/data_wait_fraction_max": 0.60,
        "perf/device_wait_fraction_min": 0.36,
    }


def test_from_the_speed_of_a_process():
    speed = {
        "perf/step_seconds": 0.5,
        "perf/data_wait_fraction": 0.2,
        "perf/device_wait_fraction": 0.7,
    }
    own = ProcessSpeed.of("h", speed)
    assert own == ProcessSpeed("h", 0.5, 0.2, 0.7) and own.host_work == pytest.approx(0.1)


def test_who_and_why():
    assert straggler([quick(0), quick(1), SLOW_DATA, quick(3)]) == (2, "data")
    assert straggler([BUSY, quick(1), quick(2)]) == (0, "host")
    assert straggler([quick(0), SLOW_DATA]) == (1, "data")


def test_nobody():
    assert straggler([SLOW_DATA]) is None
    assert straggler([quick(0), quick(1)]) is None
    assert straggler([SLOW_DATA, SLOW_DATA]) is None  # all wait alike: no straggler
    little = ProcessSpeed("h", 1.0, 0.10, 0.86)
    assert straggler([quick(0), little, quick(2)]) is None


def test_it_is_named_at_the_second_time_and_then_for_a_while_not_again():
    watch = StragglerWatch(silence=100)
    slow = [quick(0), SLOW_DATA, quick(2)]
    assert watch.look(slow, now=0) is None
    line = watch.look(slow, now=1)
    assert "process 1 on host hostD waits for its data 60% of the time, the others 1%" in line
    assert watch.look(slow, now=2) is None
    assert watch.look(slow, now=102) is not None
    assert watch.look([quick(0), quick(1), BUSY], now=103) is None
    line = watch.look([quick(0), quick(1), BUSY], now=104)
    assert "process 2 on host hostB is busy" in line and "49% of the time, the others 4%" in line


def test_once_alone_is_chance():
    watch = StragglerWatch()
    for now in range(10):
        speeds = [quick(0), SLOW_DATA] if now % 2 else [quick(0), quick(1)]
        assert watch.look(speeds, now) is None

import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.observe import accelerators
from vlp_jax.observe.accelerators import PeakFlops, peak_flops
from vlp_jax.observe.throughput import StartupClock, StepClock, TimeLedger


class Clock:
    def __init__(self):
        self.now = 10.0

    def __call__(self):
        return self.now


def _step_clock(**overrides):
    clock = Clock()
    arguments = dict(
        forward_flops_per_example=1e9,
        peak=PeakFlops(1e12, "table"),
        device_count=4,
        time_fn=clock,
    )
    return StepClock(**{**arguments, **overrides}), clock


@pytest.mark.parametrize(
    ("kind", "dtype", "tflops"),
    [
        ("TPU v2", jnp.bfloat16, 23.0),
        ("TPU v3", jnp.bfloat16, 61.5),
        ("TPU v4", jnp.bfloat16, 275.0),
        ("TPU v5 lite", jnp.bfloat16, 197.0),
        ("TPU v5", jnp.bfloat16, 459.0),
        ("TPU v5p", jnp.float32, 459.0),
        ("TPU v6 lite", jnp.bfloat16, 918.0),
        ("TPU7x", jnp.bfloat16, 1153.5),
        ("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 312.0),
        ("NVIDIA A100-SXM4-80GB", jnp.float32, 156.0),
        ("NVIDIA H100 80GB HBM3", jnp.bfloat16, 989.5),
        ("NVIDIA H100 PCIe", jnp.bfloat16, 756.5),
        ("NVIDIA H100 NVL", jnp.bfloat16, 835.5),
        ("NVIDIA H200", jnp.bfloat16, 989.5),
        ("NVIDIA H200 NVL", jnp.bfloat16, 835.5),
        ("NVIDIA B200", jnp.bfloat16, 2250.0),
        ("NVIDIA GB200", jnp.bfloat16, 2500.0),
        ("NVIDIA L4", jnp.bfloat16, 121.0),
        ("NVIDIA L40S", jnp.bfloat16, 362.0),
        ("NVIDIA A10G", jnp.bfloat16, 70.0),
        ("NVIDIA A10", jnp.bfloat16, 125.0),
        ("Tesla V100-SXM2-16GB", jnp.float16, 125.0),
        ("Tesla V100-SXM2-16GB", jnp.bfloat16, 15.7),
        ("Tesla V100-PCIE-32GB", jnp.float16, 112.0),
        ("Tesla T4", jnp.float16, 65.0),
        ("NVIDIA GeForce RTX 4090", jnp.bfloat16, 165.2),
    ],
)
def test_known_accelerators_come_from_the_table(kind, dtype, tflops):
    peak = peak_flops(SimpleNamespace(device_kind=kind, platform="x"), dtype)
    assert peak.source == "table"
    assert peak.flops == pytest.approx(tflops * 1e12)


@pytest.mark.parametrize(
    "kind",
    [
        "cpu",
        "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA H20",
        "NVIDIA L40",
        "TPU v9",
    ],
)
def test_others_are_measured(kind, monkeypatch):
    monkeypatch.setattr(accelerators, "_measured_flops", lambda device, dtype: 123.0)
    peak = peak_flops(SimpleNamespace(device_kind=kind, platform="x"), jnp.bfloat16)
    assert (peak.flops, peak.source) == (123.0, "measured")


def test_the_cpu_is_measured_and_shared_by_its_devices(monkeypatch):
    device = jax.devices("cpu")[0]
    started = time.perf_counter()
    peak = peak_flops(device, jnp.float32)
    elapsed = time.perf_counter() - started
    assert peak.source == "measured"
    assert 1e8 < peak.flops < 1e14
    assert elapsed < 5.0  # 0.3 s on an idle machine
    devices = jax.local_devices(backend="cpu")
    monkeypatch.setattr(jax, "local_devices", lambda backend: devices * 100)
    assert peak_flops(device, jnp.float32).flops < peak.flops / 10


def test_only_dtypes_of_training_have_a_peak():
    with pytest.raises(ValueError, match="int8"):
        peak_flops(jax.devices("cpu")[0], jnp.int8)


@pytest.mark.parametrize(
    ("again", "mfu", "source"),
    [(4e9, 0.75, "measured"), (1e9, None, "measured"), (4e9, None, "table")],
)
def test_a_peak_that_steps_beat_is_measured_again_in_a_pause(again, mfu, source):
    """And what is above 1 all the same is left out."""
    measured = []

    def measure():
        measured.append(now.now)
        return PeakFlops(again, "measured")

    clock, now = _step_clock(peak=PeakFlops(2e9, source), device_count=1, measure=measure)

    def window():
        now.now += 1.0
        clock.step_done(1)
        return clock.summary()

    assert "perf/mfu" not in window() and clock.peak.flops == 2e9
    assert "perf/examples_per_second" in window() and measured == []  # devices are busy
    for _ in range(2):
        with clock.paused("evaluation"):
            pass
        assert window().get("perf/mfu") == mfu == clock.overall().get("perf/mfu")
    assert len(measured) == {0.75: 1, None: 4}[mfu] * (source == "measured")
    assert clock.peak.flops == (4e9 if mfu else 2e9)


def test_summary_arithmetic():
    clock, now = _step_clock()
    for _ in range(5):
        with clock.data_wait():
            now.now += 0.1
        now.now += 0.3
        clock.step_done(32)
    summary = clock.summary()
    assert summary == pytest.approx(
        {
            "perf/examples_per_second": 160 / 2.0,
            "perf/steps_per_second": 2.5,
            "perf/mfu": 3 * 1e9 * 80 / 4e12,
            "perf/data_wait_fraction": 0.25,
            "perf/device_wait_fraction": 0.0,
            "perf/step_seconds": 0.4,
        }
    )


def test_windows_are_separate_and_pauses_are_not_in_them():
    clock, now = _step_clock()
    with clock.paused("compile"):
        with clock.data_wait():
            now.now += 7
        now.now += 13
        clock.step_done(32)
    assert clock.summary() == {}  # the compiled step is in no window
    now.now += 1
    clock.step_done(10)
    with clock.paused("evaluation"):
        now.now += 100
        with clock.paused("checkpoint"):
            now.now += 50
    assert clock.summary()["perf/examples_per_second"] == pytest.approx(10)
    with clock.data_wait():
        now.now += 2
    clock.step_done(10)
    second = clock.summary()
    assert second["perf/examples_per_second"] == pytest.approx(5)
    assert second["perf/data_wait_fraction"] == pytest.approx(1)
    assert clock.goodput() == pytest.approx(
        {
            "useful": 1,
            "compile": 20,
            "evaluation": 100,
            "checkpoint": 50,
            "data wait": 2,
        }
    )


def test_a_summary_without_a_step_keeps_the_window():
    clock, now = _step_clock()
    now.now += 3
    assert clock.summary() == {}
    now.now += 1
    clock.step_done(8)
    assert clock.summary()["perf/step_seconds"] == pytest.approx(4)


def test_goodput_accounts_for_every_second():
    clock, now = _step_clock(before={"start": 30.0, "compile": 4.0})
    begun = now.now
    with clock.paused("compile"):
        now.now += 10
    for _ in range(10):
        with clock.data_wait():
            now.now += 1
        now.now += 5
        clock.step_done(1)
    clock.finish()
    now.now += 6
    assert sum(clock.goodput().values()) == pytest.approx(34 + now.now - begun)
    assert clock.goodput() == pytest.approx(
        {"useful": 50, "start": 30, "compile": 14, "data wait": 10, "checkpoint": 6}
    )


def test_overall_is_over_all_windows_and_steps():
    clock, now = _step_clock()
    assert clock.overall() == {}
    for seconds in (1.0, 3.0):
        with clock.data_wait():
            now.now += 0.5
        now.now += seconds
        clock.step_done(10)
        assert clock.summary()
        with clock.paused("evaluation"):
            now.now += 100
    assert clock.overall() == pytest.approx(
        {
            "perf/examples_per_second": 20 / 5,
            "perf/steps_per_second": 2 / 5,
            "perf/mfu": 3 * 1e9 * 4 / 4e12,
        }
    )
    assert (clock.steps_done, clock.examples_done) == (2, 20)


class Step:
    """Stands for the arrays of a step; `jax.block_until_ready` waits until it is `done`."""

    def __init__(self):
        self.done = threading.Event()

    def block_until_ready(self):
        assert self.done.wait(10)
        return self


def _wait_until_noted(clock, count):
    while clock._watch._done[0] < count:
        time.sleep(0.001)


def test_waiting_for_data_costs_nothing_while_the_devices_are_busy():
    clock, now = _step_clock()
    step = Step()
    clock.dispatched(step)
    with clock.data_wait():
        now.now += 4
        step.done.set()
        _wait_until_noted(clock, 1)
        now.now += 1  # of these 5 seconds, the devices had nothing to do for this one alone
    clock.step_done(8)
    assert clock.summary()["perf/data_wait_fraction"] == pytest.approx(1 / 5)
    with clock.data_wait():  # the devices are done already
        now.now += 2
    later = Step()
    clock.dispatched(later)
    with clock.data_wait():  # they are busy all the time
        now.now += 8
    clock.step_done(8)
    assert clock.summary()["perf/data_wait_fraction"] == pytest.approx(2 / 10)
    later.done.set()
    clock.finish()
    assert clock.goodput() == pytest.approx({"useful": 12, "data wait": 3, "checkpoint": 0})


def test_a_step_that_failed_is_done():
    clock, now = _step_clock()

    class Failed:
        def block_until_ready(self):
            raise RuntimeError

    clock.dispatched(Failed())
    _wait_until_noted(clock, 1)
    with clock.data_wait():
        now.now += 3
    assert clock.goodput()["data wait"] == pytest.approx(3)


def test_waiting_for_the_devices_is_told_and_stays_useful():
    clock, now = _step_clock()
    now.now += 1
    with clock.device_wait():
        now.now += 3
    clock.step_done(8)
    with clock.paused("evaluation"), clock.device_wait():
        now.now += 50
    assert clock.summary()["perf/device_wait_fraction"] == pytest.approx(0.75)
    assert clock.goodput() == pytest.approx({"useful": 4, "evaluation": 50})


def test_compiling_is_charged_wherever_it_happens():
    clock, now = _step_clock()
    with clock.paused("evaluation"):
        now.now += 10
        clock.compiled(7)
    now.now += 5
    clock.compiled(2)
    assert clock.goodput() == pytest.approx({"useful": 3, "evaluation": 3, "compile": 9})
    clock.compiled(1e6)  # never more than there is
    assert clock.goodput() == pytest.approx({"useful": 0, "evaluation": 3, "compile": 12})


def test_a_pause_has_a_cause_of_its_own():
    clock, _ = _step_clock()
    with pytest.raises(ValueError, match="useful"), clock.paused("useful"):
        pass


def test_the_ledger_charges_also_when_the_body_raises():
    now = Clock()
    ledger = TimeLedger("other", now)
    with pytest.raises(RuntimeError), ledger.cause("a"):
        now.now += 2
        raise RuntimeError
    now.now += 1
    assert ledger.seconds() == {"other": 1, "a": 2}


def test_startup_report():
    now = Clock()
    startup = StartupClock(now)
    with startup.phase("import tensorflow"):
        now.now += 3
    now.now += 0.5
    with startup.phase("compile"):
        now.now += 5
        with startup.phase("first batch"):
            now.now += 1
    with startup.phase("compile"):
        now.now += 0.5
    assert startup.total() == pytest.approx(10)
    assert startup.causes() == pytest.approx({"start": 4.5, "compile": 5.5})
    assert startup.report().splitlines() == [
        "first step after 10.0 s:",
        "  import tensorflow     3.00 s   30%",
        "  compile               5.50 s   55%",
        "  first batch           1.00 s   10%",
        "  other                 0.50 s    5%",
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells when a process started")
def test_startup_counts_from_the_start_of_the_process():
    total = StartupClock.from_process_start().total()
    assert 0 <= total < 24 * 3600
    assert total > 0.2  # the imports above took longer

import sys
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from vlp_jax.observe import accelerators
from vlp_jax.observe.throughput import StartupClock, StepClock, TimeLedger, peak_flops


class Clock:
    def __init__(self):
        self.now = 10.0

    def __call__(self):
        return self.now


def _step_clock(**overrides):
    clock = Clock()
    arguments = dict(
        forward_flops_per_example=1e9,
        peak_flops_per_device=1e12,
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
            "start": 0,
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
    clock, now = _step_clock(startup_seconds=30.0)
    begun = now.now
    with clock.paused("compile"):
        now.now += 10
    for _ in range(10):
        with clock.data_wait():
            now.now += 1
        now.now += 5
        clock.step_done(1)
    assert sum(clock.goodput().values()) == pytest.approx(30 + now.now - begun)
    line = "1m40s, of which useful 50.0%, start 30.0%, compile 10.0%, data wait 10.0%"
    assert clock.goodput_line() == line


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

import os
from types import SimpleNamespace

import jax
import pytest

from vlp_jax.observe.accelerators import host_rss_bytes, largest, memory_metrics


def device(**stats):
    return SimpleNamespace(memory_stats=lambda: stats or None)


def test_the_fullest_device_counts():
    devices = [
        device(bytes_in_use=5, peak_bytes_in_use=70, bytes_limit=100, num_allocs=3),
        device(bytes_in_use=6, peak_bytes_in_use=60, bytes_limit=100),
        device(),
    ]
    found = memory_metrics(devices)
    assert found.pop("memory/host_rss_bytes") > 0
    assert found == {
        "memory/bytes_in_use": 6.0,
        "memory/peak_bytes_in_use": 70.0,
        "memory/limit": 100.0,
    }


def test_devices_that_do_not_tell_all():
    assert "memory/limit" not in memory_metrics([device(bytes_in_use=5)])


def test_on_cpu_the_host_alone():
    assert jax.local_devices()[0].memory_stats() is None
    assert set(memory_metrics()) == {"memory/host_rss_bytes"}


def test_the_host_is_what_the_system_says():
    with open("/proc/self/status") as file:
        (line,) = [line for line in file if line.startswith("VmRSS:")]
    assert host_rss_bytes() == pytest.approx(int(line.split()[1]) * 1024, rel=0.2)
    before = host_rss_bytes()
    block = bytearray(os.urandom(64)) * 2**20  # 64 MiB that are touched
    assert host_rss_bytes() - before > 32 * 2**20
    del block


def test_not_on_linux(tmp_path):
    assert host_rss_bytes(str(tmp_path / "statm")) is None


def test_over_processes_each_metric_by_itself():
    rows = [{"a": 1.0, "b": 5.0}, {"a": 2.0}, {"b": 4.0}]
    assert largest(rows) == {"a": 2.0, "b": 5.0}

"""tools.bench_loss: the figures of both forms, and what it calls a fault."""

import json

import jax
import pytest

from tools import bench_loss

SMALL = ("--memory-batch", "512", "--time-batch", "64", "--dim", "8", "--block-size", "8")


@pytest.fixture(autouse=True)
def cache_as_before():
    before = jax.config.jax_enable_compilation_cache
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def test_less_memory_and_the_same_numbers(tmp_path, capsys):
    file = tmp_path / "figures.json"
    limits = ("--most-time-ratio", "1e9", "--least-memory-ratio", "3")
    assert bench_loss.main([*SMALL, *limits, "--rounds", "1", "--json", str(file)]) == 0
    figures = json.loads(file.read_text())
    assert figures.keys() == {"softmax", "sigmoid"}
    for found in figures.values():
        assert found["plain_bytes"] > 512 * 512 * 4 > found["blocked_bytes"]
        assert found["difference"] < 1e-5


def test_a_limit_that_is_not_held_is_a_fault(capsys):
    limits = ("--most-time-ratio", "1e9", "--least-memory-ratio", "1e6")
    assert bench_loss.main([*SMALL, *limits, "--rounds", "1"]) == 1
    assert "the plain form needs only" in capsys.readouterr().err

"""tools.perf.loss: the figures of both forms, and what it calls a fault."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tools.perf import loss as bench_loss

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
    assert set(bench_loss.PAIRWISE_LOSSES) == {"softmax", "sigmoid"}
    for found in (figures[name] for name in ("softmax", "sigmoid")):
        assert found["plain_bytes"] > 512 * 512 * 4 > found["blocked_bytes"]
        assert found["difference"] < 1e-5


def test_a_limit_that_is_not_held_is_a_fault(capsys):
    limits = ("--most-time-ratio", "1e9", "--least-memory-ratio", "1e6")
    assert bench_loss.main([*SMALL, *limits, "--rounds", "1"]) == 1
    assert "the plain form needs only" in capsys.readouterr().err


def test_nan_anywhere_is_a_difference():
    def result(**changed):
        parts = {"loss": 1.0, "hits": 0.0, "image": np.ones(3), "text": np.ones(3), **changed}
        parts = {name: jnp.asarray(part) for name, part in parts.items()}
        last = jnp.ones(()), jnp.zeros(())
        return (parts["loss"], parts["hits"]), (parts["image"], parts["text"], *last)

    assert bench_loss.difference(result(), result()) == 0  # no hits in either
    assert bench_loss.difference(result(), result(text=np.full(3, 1.5))) == 0.5
    for name in ("loss", "image", "text"):
        assert math.isnan(bench_loss.difference(result(), result(**{name: np.full(3, np.nan)})))


@pytest.mark.parametrize("argument", ["--rounds", "--block-size", "--dim"])
def test_mistakes_are_one_line(argument, capsys):
    assert bench_loss.main([*SMALL, argument, "0"]) == 2
    assert f"{argument} must be at least 1" in capsys.readouterr().err

"""Meshes, batches on them, and the thread that runs ahead."""

import itertools
import threading

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import startup
from vlp_jax.parallel.batch import Prefetcher, put_batch


def test_batch_size_must_be_divisible():
    mesh = mesh_lib.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    mesh_lib.check_batch_size(12, mesh)
    with pytest.raises(UserError, match="13 is not divisible by the 4 devices .*; 12 would be"):
        mesh_lib.check_batch_size(13, mesh)


def test_a_batch_is_spread_over_the_batch_axes():
    mesh = mesh_lib.make_mesh({"replica": 2, "fsdp": 2, "tensor": 2})
    batch = {"x": np.arange(24).reshape(8, 3)}
    array = put_batch(batch, mesh)["x"]
    assert array.sharding.spec == PartitionSpec(("replica", "fsdp"))
    assert {shard.data.shape for shard in array.addressable_shards} == {(2, 3)}
    np.testing.assert_array_equal(array, batch["x"])


def numbered():
    return ({"x": np.full((8, 1), i)} for i in itertools.count())


def test_prefetcher_keeps_the_order_and_stops():
    mesh = mesh_lib.make_mesh({"replica": 8})
    with Prefetcher(numbered(), mesh, size=2) as batches:
        assert [int(next(batches)["x"][0, 0]) for _ in range(5)] == list(range(5))
    assert not any(t.name == "prefetch" and t.is_alive() for t in threading.enumerate())


def test_prefetcher_runs_ahead_but_not_further_than_asked():
    seen = []

    def watched():
        for i, batch in enumerate(numbered()):
            seen.append(i)
            yield batch

    with Prefetcher(watched(), mesh_lib.make_mesh({"replica": 8}), size=2) as batches:
        next(batches)
        threading.Event().wait(0.5)
        assert 2 <= len(seen) <= 5


def test_prefetcher_raises_what_the_source_raised():
    def failing():
        yield {"x": np.zeros((8, 1))}
        raise UserError("bad picture")

    with Prefetcher(failing(), mesh_lib.make_mesh({"replica": 8}), size=2) as batches:
        next(batches)
        with pytest.raises(UserError, match="bad picture"):
            next(batches)


def test_prefetcher_ends_with_its_source():
    with Prefetcher(iter([]), mesh_lib.make_mesh({"replica": 8})) as batches:
        assert list(batches) == []


def test_start_needs_all_three_or_none():
    startup.initialize()
    with pytest.raises(UserError, match="belong together"):
        startup.initialize("localhost:1", 2, None)


def test_compilation_cache_respects_what_is_set():
    assert startup.use_compilation_cache() == jax.config.jax_compilation_cache_dir

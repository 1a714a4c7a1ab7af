"""Collectives of compiled programs: which kind, along which axis, how many bytes."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from vlp_jax.planning import hlo, loops, traffic
from vlp_jax.planning.traffic import axes_of, parse_groups

SHAPE = {"replica": 2, "fsdp": 2, "tensor": 2}
ROUNDS, ROWS, COLUMNS = 3, 8, 16  # of a device
BLOCK = ROWS * COLUMNS * 4
TPU_TEXT = (Path(__file__).parent / "fsdp_v5e_2x4.hlo").read_text()


def sent(function):
    """By a device, of `function` on blocks of a device, by kind and axis."""
    mesh = jax.make_mesh(tuple(SHAPE.values()), tuple(SHAPE), (AxisType.Auto,) * 3)
    spec = PartitionSpec(("replica", "fsdp"))

    def repeated(x):
        return lax.scan(lambda x, _: (function(x), None), x, length=ROUNDS)[0]

    whole = jax.shard_map(repeated, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((4 * ROWS, COLUMNS), jnp.float32)
    module = hlo.parse(jax.jit(whole).lower(x).compile().as_text())
    found = traffic.collectives(module, loops.count_runs(module), SHAPE)
    return traffic.by_kind_and_axis(found)


@pytest.mark.parametrize("axis", SHAPE)
def test_every_kind_is_found_on_its_axis_in_every_round(axis):
    def gather_and_scatter(x):
        return lax.psum_scatter(jnp.sin(lax.all_gather(x, axis, tiled=True)), axis, tiled=True)

    # Of two devices each sends its block once; an all-reduce is a scatter and a gather of halves.
    block = ROUNDS * BLOCK
    assert sent(gather_and_scatter) == {
        "all-gather": {axis: block},
        "reduce-scatter": {axis: block},
    }
    assert sent(lambda x: jnp.sin(lax.psum(x, axis))) == {"all-reduce": {axis: block}}
    assert sent(lambda x: jnp.sin(lax.all_to_all(x, axis, 0, 0, tiled=True))) == {
        "all-to-all": {axis: block / 2}
    }
    assert sent(lambda x: jnp.sin(lax.ppermute(x, axis, [(0, 1), (1, 0)]))) == {
        "collective-permute": {axis: block}
    }


def test_a_ring_over_two_axes_and_a_sum_over_all():
    pairs = [(i, (i + 1) % 4) for i in range(4)]
    ring = sent(lambda x: jnp.sin(lax.ppermute(x, ("replica", "fsdp"), pairs)))
    assert ring == {"collective-permute": {"replica+fsdp": ROUNDS * BLOCK}}
    total = sent(lambda x: jnp.sin(lax.psum(x, tuple(SHAPE))))
    assert total == {"all-reduce": {"replica+fsdp+tensor": pytest.approx(1.75 * ROUNDS * BLOCK)}}


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=1,'c'=2] {'a','b','c'}, x", [[0, 1, 2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(1)2}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=4] {'a':(2)2}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_all_forms(text, groups):
    assert parse_groups(f", channel_id=1, {text}", 4) == groups


def test_groups_in_an_unknown_form_are_no_groups():
    with pytest.raises(ValueError, match="no known form"):
        parse_groups(", replica_groups=?", 4)


def test_axes_are_those_along_which_the_devices_of_a_group_differ():
    places = np.arange(24).reshape(2, 3, 4)
    shape = {"a": 2, "b": 3, "c": 4}
    assert axes_of(places.reshape(6, 4).tolist(), shape) == ("c",)
    assert axes_of(places.transpose(0, 2, 1).reshape(8, 3).tolist(), shape) == ("b",)
    assert axes_of(places.transpose(1, 0, 2).reshape(3, 8).tolist(), shape) == ("a", "c")
    assert axes_of([[0], [1]], shape) == ()


def test_a_tpu_program_with_sharded_weights_sends_what_it_must():
    module = hlo.parse(TPU_TEXT)
    shape = {"replica": 2, "fsdp": 4, "tensor": 1}
    found = traffic.collectives(module, loops.count_runs(module), shape)
    weights = 3 * 1024 * 1024 * 2  # bfloat16
    # Gathered for each pass; gradients scattered, then summed over the replicas in parts.
    assert traffic.by_kind_and_axis(found) == {
        "all-gather": {"fsdp": 2 * weights * 3 / 4},
        "reduce-scatter": {"fsdp": weights * 3 / 4},
        "all-reduce": {"replica": weights / 4},
    }


CHAIN = """HloModule x, num_partitions=4

%start (p: f32[8]) -> f32[32] {
  %p = f32[8]{0} parameter(0)
  ROOT %g = f32[32]{0} all-gather(%p), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="2"}
}

%carried (q: f32[8]) -> f32[32] {
  %q = f32[8]{0} parameter(0)
  ROOT %h = f32[32]{0} all-gather(%q), channel_id=5, replica_groups=[1,4]<=[4], dimensions={0}, frontend_attributes={chain_id="2"}
}

ENTRY %main (x: f32[8]) -> f32[32] {
  %x = f32[8]{0} parameter(0)
  %async-collective-start = f32[32]{0} fusion(%x), kind=kCustom, calls=%start
  %fusion = f32[32]{0} fusion(%x), kind=kCustom, calls=%carried
  %other = f32[32]{0} all-gather-start(%x), channel_id=6, replica_groups=[1,4]<=[4], dimensions={0}
  ROOT %done = f32[32]{0} all-gather-done(%other)
}
"""  # noqa: E501


def test_a_collective_that_several_kernels_carry_counts_once():
    module = hlo.parse(CHAIN)
    found = traffic.collectives(module, loops.count_runs(module), {"fsdp": 4})
    assert [one.name for one in found] == ["g", "other"]
    assert traffic.by_kind_and_axis(found) == {"all-gather": {"fsdp": 2 * 3 * 8 * 4}}

"""Chips, links and the times and costs that follow."""

from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from vlp_jax.parallel.topologies import known_topologies
from vlp_jax.planning import traffic
from vlp_jax.planning.plan import Roofline
from vlp_jax.planning.report import Findings
from vlp_jax.planning.target import GB, GPUS, TPUS
from vlp_jax.planning.traffic import Collective


def grid(*sides, slices=1):
    """Devices of a torus in the order of their coordinates, the last axis fastest."""
    devices = []
    for part in range(slices):
        for place in range(sides[0] * sides[1] * (sides[2] if len(sides) > 2 else 1)):
            coords, rest = [], place
            for side in reversed(sides):
                rest, at = divmod(rest, side)
                coords.insert(0, at)
            devices.append(SimpleNamespace(coords=coords, slice_index=part, id=len(devices)))
    return devices


def collective(kind, groups, payload=1000):
    return Collective(kind, "x", ("fsdp",), payload, 1.0, groups)


def test_a_full_axis_of_a_torus_has_two_links_and_a_part_of_it_one():
    chip, devices = TPUS["v5e"], grid(16, 16)
    column = [list(range(row, 256, 16)) for row in range(16)]
    half = [group[:8] for group in column]
    whole = [list(range(256))]
    assert traffic.bandwidth(collective("all-reduce", column), devices, chip) == 100 * GB
    assert traffic.bandwidth(collective("all-reduce", half), devices, chip) == 50 * GB
    assert traffic.bandwidth(collective("all-gather", whole), devices, chip) == 200 * GB
    assert traffic.bandwidth(collective("collective-permute", [[0, 1]]), devices, chip) == 50 * GB
    # An axis of 8 does not close to a ring on v5e, one of 4 does on v5p.
    assert traffic.bandwidth(collective("all-gather", [[0, 1]]), grid(8, 8), chip) == 50 * GB
    cube = [list(range(4))]
    assert traffic.bandwidth(collective("all-gather", cube), grid(4, 4, 4), TPUS["v5p"]) == 200 * GB


def test_across_slices_and_nodes_the_slow_network_counts():
    chip, devices = TPUS["v5e"], grid(4, 4, slices=2)
    across = collective("all-reduce", [[0, 16]], payload=10**9)
    assert traffic.bandwidth(across, devices, chip) == chip.slow_bandwidth == 25 / 8 * GB
    seconds = traffic.network_seconds([across], devices, chip)
    assert seconds == pytest.approx(2 * 1e9 * 0.5 / (25 / 8 * GB))
    assert traffic.network_seconds([across], devices, TPUS["v4"]) is None
    gpus = [SimpleNamespace(id=i) for i in range(16)]
    inside, beyond = collective("all-reduce", [[0, 7]]), collective("all-reduce", [[0, 8]])
    assert traffic.bandwidth(inside, gpus, GPUS["h100"]) == 450 * GB
    assert traffic.bandwidth(beyond, gpus, GPUS["h100"]) == 50 * GB


def test_the_slowest_resource_bounds_a_step():
    roofline = Roofline(compute=0.2, memory=0.3, network=0.1)
    assert (roofline.step_seconds, roofline.bound_by) == (0.3, "memory")
    assert roofline.serial_seconds == pytest.approx(0.6)
    partly = Roofline(compute=0.2, memory=None, network=None)
    assert (partly.step_seconds, partly.bound_by) == (0.2, "compute")
    nothing = Roofline(None, None, None)
    assert (nothing.step_seconds, nothing.bound_by, nothing.serial_seconds) == (None, None, None)


def test_costs_are_those_of_the_whole_schedule():
    setup = SimpleNamespace(
        units=SimpleNamespace(total_steps=172_800), config=SimpleNamespace(batch_size=1024)
    )
    plan = SimpleNamespace(setup=setup, target=SimpleNamespace(chips=256), model_flops=2e15)
    one = Findings(plan, price_per_chip_hour=2.0)._cost(0.5, 16e15)
    assert (one.days, one.examples_per_second, one.mfu) == (1.0, 2048, 0.25)
    assert (one.chip_hours, one.price) == (24 * 256, 2 * 24 * 256)


def test_every_topology_has_a_chip_with_a_peak():
    kinds = {name.partition(":")[0] for name in known_topologies()}
    assert kinds == set(TPUS)
    for chip in (*TPUS.values(), *GPUS.values()):
        assert chip.peak_flops(jnp.bfloat16) > 1e14
    # The clocks that follow from peak and units are those that are known.
    assert TPUS["v4"].clock == pytest.approx(1.05e9, rel=0.01)  # Jouppi et al. 2023, table 4
    assert TPUS["v5e"].clock == pytest.approx(1.5e9, rel=0.01)

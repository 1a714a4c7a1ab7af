"""The time of collectives on the links between devices, at the links' full rate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlp_jax.planning.chips import Chip
from vlp_jax.planning.traffic import Collective


def seconds(found: Sequence[Collective], devices: Sequence[Any], chip: Chip) -> float | None:
    """Returns the time of all collectives of a step, one after the other; None if not known.

    Latencies are left out, and so is what shares a link at the same time.

    Args:
      devices: of the mesh, in its order.
    """
    total = 0.0
    for collective in found:
        rate = bandwidth(collective, devices, chip)
        if rate is None:
            return None
        total += collective.step_bytes / rate
    return total


def bandwidth(collective: Collective, devices: Sequence[Any], chip: Chip) -> float | None:
    """Returns the bytes a second that a device can send in a collective; None if not known.

    On a torus a group uses the links along every physical axis over which it lies: two of an axis
    that it fills and that closes to a ring, else one. A permutation uses one link.
    """
    groups = [[devices[place] for place in group] for group in collective.groups]
    # One slow link is enough: a ring goes at the rate of its slowest link.
    if any(_leaves_island(group, chip) for group in groups):
        return chip.slow_bandwidth
    if not chip.torus_axes or collective.kind == "collective-permute":
        return chip.link_bandwidth
    links = 0
    for axis in range(chip.torus_axes):
        length = len({device.coords[axis] for device in devices})
        here = len({device.coords[axis] for device in groups[0]})
        if here > 1:
            # Both directions of a ring carry half each; without the wrap-around link one of them is
            # open.
            links += 2 if here == length and length % chip.wraps_at == 0 else 1
    # Two devices of one chip have no link between them, and need none.
    return chip.link_bandwidth * (links or 2 * chip.torus_axes)


def _leaves_island(group: Sequence[Any], chip: Chip) -> bool:
    if chip.node_devices is not None:
        return len({device.id // chip.node_devices for device in group}) > 1
    return len({getattr(device, "slice_index", None) for device in group}) > 1

"""Makes the device mesh, and the shardings of batches and of replicated arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlp_jax.errors import UserError
from vlp_jax.parallel.mesh_sizes import AXES, resolve_sizes
from vlp_jax.parallel.placement import islands, place

# The axes over which the examples of a batch are split.
BATCH_AXES = ("replica", "fsdp")


def make_mesh(section: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `AXES` over `devices` (default: all devices of the job).

    Args:
      section: `config.mesh`: `preset`, and the number of devices along each axis; see
        `mesh_sizes.resolve_sizes`.

    Raises:
      UserError: an unknown axis or preset, sizes that contradict each other or do not fit the
        devices, or a mesh that would split slices or processes; see `placement.place`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_sizes(section, len(devices), len(islands(devices)))
    return Mesh(place(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch_size(batch_size: int, mesh: Mesh, what: str = "config.batch_size") -> None:
    """Raises UserError if the mesh does not divide the global batch."""
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if batch_size < 1 or batch_size % parts:
        axes = " x ".join(f"{axis} {mesh.shape[axis]}" for axis in BATCH_AXES)
        below = max(parts, batch_size - batch_size % parts)
        raise UserError(
            f"{what} {batch_size} is not divisible by the {parts} devices that share a batch "
            f"({axes}); {below} would be"
        )


def describe(mesh: Mesh) -> str:
    """Describes devices and mesh in one line, for the log."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    groups = len(islands(mesh.devices.flat))
    slices = f" and {groups} slices" if groups > 1 else ""
    return f"{mesh.size} x {kind} in {jax.process_count()} process(es){slices}, mesh {axes}"

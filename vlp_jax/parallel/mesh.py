"""The device mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from vlp_jax.errors import UserError, unknown_key_message

# Data parallel (across hosts or slices), sharded parameters, sharded matrix products.
AXES = ("replica", "fsdp", "tensor")
# The axes over which the examples of a batch are spread.
BATCH_AXES = ("replica", "fsdp")


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of `AXES` over `devices` (default: all of the job).

    Args:
      sizes: devices along each axis, 1 for an axis that is not named. One may be -1: all devices
        that the others leave.

    Raises:
      UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    for axis in sizes:
        if axis not in AXES:
            raise UserError(unknown_key_message(axis, AXES, "config.mesh"))
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    if any(size < 1 and size != -1 for size in shape) or shape.count(-1) > 1:
        raise UserError(f"mesh {text}: sizes are at least 1, and at most one of them is -1")
    given = math.prod(size for size in shape if size != -1)
    if -1 in shape and len(devices) % given == 0:
        shape[shape.index(-1)] = len(devices) // given
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh {text} does not fit the {len(devices)} devices of this job; "
            "set config.mesh so that the product of its sizes is the number of devices"
        )
    return jax.make_mesh(tuple(shape), AXES, (AxisType.Auto,) * len(AXES), devices=devices)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples spread over the batch axes, everything else whole."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same array on every device."""
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
    """One line for the log."""
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind} in {jax.process_count()} process(es), mesh {axes}"

"""Makes the device mesh from `config.mesh`, and the shardings of batches and replicated arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.parallel.placement import islands, place

# replica: data parallel, across hosts or slices. fsdp: data parallel with sharded parameters.
# tensor: sharded matrix products.
AXES = ("replica", "fsdp", "tensor")
# Preset -> the axis that takes the remaining devices; if its size is given, `replica` takes them.
PRESETS = {"dp": "replica", "fsdp": "fsdp", "fsdp_tp": "fsdp", "hybrid": "fsdp"}
KEYS = ("preset", *AXES)
# The axes over which the examples of a batch are split.
BATCH_AXES = ("replica", "fsdp")


def make_mesh(section: Mapping[str, Any], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes a mesh with the axes `AXES` over `devices` (default: all devices of the job).

    Args:
      section: `config.mesh`: `preset`, and the number of devices along each axis; see
        `resolve_sizes`.

    Raises:
      UserError: an unknown axis or preset, sizes that contradict each other or do not fit the
        devices, or a mesh that would split slices or processes; see `placement.place`.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = resolve_sizes(section, len(devices), len(islands(devices)))
    return Mesh(place(devices, shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def resolve_sizes(section: Mapping[str, Any], devices: int, islands: int) -> tuple[int, ...]:
    """Returns the number of devices along each of `AXES`; the product is `devices`.

    A given size is used; -1 means all remaining devices. If no size is -1, one of the axes without
    a size takes the remaining devices. All other axes have the size 1:

    | preset | takes the remaining devices | besides |
    |---|---|---|
    | none, "dp" | `replica` | |
    | "fsdp" | `fsdp` | |
    | "fsdp_tp" | `fsdp` | `tensor` must be given |
    | "hybrid" | `fsdp` | `replica` is the number of islands |

    If the preset's axis has a given size, `replica` takes the remaining devices.

    Args:
      section: `config.mesh`, or any part of it.
      devices: number of devices of the whole job.
      islands: number of device groups with a fast network, see `placement.islands`.

    Raises:
      UserError: an unknown axis or preset, a size that contradicts the preset, or sizes whose
        product is not the number of devices.
    """
    for key in section:
        if key not in KEYS:
            raise UserError(unknown_key_message(key, KEYS, "config.mesh"))
    preset = section.get("preset")
    if preset is not None and preset not in PRESETS:
        raise UserError(unknown_key_message(str(preset), PRESETS, "config.mesh.preset"))
    given = {axis: int(section[axis]) for axis in AXES if section.get(axis) is not None}
    text = ", ".join(f"{axis} {size}" for axis, size in given.items())
    if any(size < 1 and size != -1 for size in given.values()) or [*given.values()].count(-1) > 1:
        raise UserError(f"mesh {text}: sizes are at least 1, and at most one of them is -1")
    if preset is not None:
        _check_against(preset, given)
    sizes = _fill(preset, given, islands)
    shape = _with_rest(sizes, devices, preset)
    if preset == "hybrid" and shape[0] % islands:
        raise UserError(
            f"config.mesh.preset hybrid has replica run over the {islands} slices or processes of "
            f"this job, but replica is {shape[0]}: set it to a multiple, or leave it out"
        )
    return shape


def _check_against(preset: str, given: Mapping[str, int]) -> None:
    """Raises UserError for a size that makes the preset pointless."""
    fsdp, tensor = given.get("fsdp"), given.get("tensor")
    what = f"config.mesh.preset {preset}"
    drop = "or leave the preset out (--config.mesh.preset=None)"
    wrong = next((axis for axis in ("fsdp", "tensor") if given.get(axis) not in (None, 1)), None)
    fault = None
    if preset == "dp" and wrong:
        fault = (
            f"keeps parameters whole, but config.mesh.{wrong} is {given[wrong]}: remove that size"
        )
    elif preset != "dp" and fsdp == 1:
        fault = "shards parameters, but config.mesh.fsdp is 1: remove that size"
    elif preset == "fsdp" and tensor not in (None, 1):
        fault = f"has no tensor axis, but config.mesh.tensor is {tensor}: use preset fsdp_tp"
    elif preset == "fsdp_tp" and tensor in (None, 1):
        fault = "needs the size of the tensor axis, at least 2: set --config.mesh.tensor=N"
        drop = "or use preset fsdp"
    if fault:
        raise UserError(f"{what} {fault}, {drop}")


def _fill(preset: str | None, given: Mapping[str, int], islands: int) -> dict[str, int]:
    """Returns a size for each axis; at most one of them is -1."""
    sizes = {"replica": islands if preset == "hybrid" else 1, "fsdp": 1, "tensor": 1, **given}
    if -1 not in given.values():
        takers = (PRESETS.get(preset or "dp", "replica"), "replica")
        taker = next((axis for axis in takers if axis not in given), None)
        if taker is not None:
            sizes[taker] = -1
    return sizes


def _with_rest(sizes: Mapping[str, int], devices: int, preset: str | None) -> tuple[int, ...]:
    """Returns the sizes in the order of `AXES`, with -1 replaced by the remaining devices."""
    shape = [sizes[axis] for axis in AXES]
    text = " x ".join(f"{axis} {size}" for axis, size in zip(AXES, shape, strict=True))
    known = math.prod(size for size in shape if size != -1)
    if -1 in shape and devices % known == 0:
        shape[shape.index(-1)] = devices // known
    if math.prod(shape) != devices:
        named = "" if preset is None else f" (preset {preset})"
        raise UserError(
            f"mesh {text}{named} does not fit the {devices} devices of this job; "
            "set config.mesh so that the product of its sizes is the number of devices"
        )
    return tuple(shape)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: the first dimension is split over the batch axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding that puts the whole array on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Returns the number of devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def check_batch_size(batch_size: int, mesh: Mesh, what: str = "config.batch_size") -> None:
    """Raises UserError if the mesh does not divide the global batch."""
    parts = batch_shards(mesh)
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

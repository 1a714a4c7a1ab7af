"""Which device stands where in the mesh: what talks most is put closest together.

`replica` crosses slow networks first, `tensor` last; `jax.make_mesh` does not take devices of
several slices at all.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from vlp_jax.errors import UserError


def islands(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices in groups with a fast network of their own, in order.

    On TPU a group is a slice. Elsewhere it is what JAX gives one `slice_index` (a host, or hosts
    that share NVLink), and without that a process.

    Raises:
      UserError: the groups are not of one size.
    """
    groups = collections.defaultdict(list)
    for device in sorted(devices, key=_order):
        groups[_island(device)].append(device)
    sizes = {len(group) for group in groups.values()}
    if len(sizes) > 1:
        raise UserError(
            f"the slices or hosts of this job have different numbers of devices {sorted(sizes)}; "
            "start it on equal ones"
        )
    return list(groups.values())


def _island(device: Any) -> int:
    index = getattr(device, "slice_index", None)
    if index is None:
        # A single slice that is only compiled for has no index.
        return 0 if device.platform == "tpu" else device.process_index
    return index


def _order(device: Any) -> tuple[int, int, int]:
    return _island(device), device.process_index, device.id


def place(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """The devices as an array of `shape`: replica, fsdp, tensor.

    On TPU, `fsdp` and `tensor` stay inside a slice, and there JAX's own assignment to the torus
    holds unless it has `tensor` leave a process though it need not. Elsewhere devices stand in the
    order of islands and processes, so that an axis leaves one only if it is too long for it.

    Raises:
      UserError: an axis other than `replica` would run over several slices of a TPU, or `tensor`
        over several processes.
    """
    groups = islands(devices)
    replica, fsdp, tensor = shape
    if devices[0].platform != "tpu":
        array = _in_order(devices, shape)
    elif replica % len(groups):
        raise UserError(
            f"mesh replica {replica} x fsdp {fsdp} x tensor {tensor} would have fsdp or tensor run "
            f"over the {len(groups)} TPU slices of this job, across the slow network between "
            f"them; set --config.mesh.preset=hybrid, or replica to a multiple of {len(groups)}"
        )
    else:
        inside = (replica // len(groups), fsdp, tensor)
        array = np.concatenate([_in_slice(group, inside) for group in groups])
    if _tensor_leaves_process(array):
        local = sum(d.process_index == devices[0].process_index for d in devices)
        raise UserError(
            f"config.mesh.tensor {tensor} would run over several processes, but each reads a part "
            f"of the batch of its own; set it to a divisor of the devices of a process ({local})"
        )
    return array


def _in_order(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    array = np.empty(len(devices), object)
    array[:] = sorted(devices, key=_order)
    return array.reshape(shape)


def _in_slice(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """JAX's assignment to the physical axes of a slice, whole ones if that is possible."""
    try:
        array = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _in_order(devices, shape) if _tensor_leaves_process(array) else array


def _tensor_leaves_process(array: np.ndarray) -> bool:
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(array)
    return bool((processes != processes[..., :1]).any())

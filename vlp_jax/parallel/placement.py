"""Places devices in the mesh: the axes that communicate most get the fastest network.

`tensor` communicates most and `replica` least. So only `replica` crosses slow networks, unless that
is impossible. `jax.make_mesh` does not accept devices of several slices.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Any

import numpy as np
from jax.experimental import mesh_utils

from vlp_jax.errors import UserError


def islands(devices: Sequence[Any]) -> list[list[Any]]:
    """Groups the devices that share a fast network, in order.

    On TPU a group is a slice. Elsewhere it is the devices with the same `slice_index` (of a host,
    or of hosts that share NVLink), or without such an index the devices of a process.

    Raises:
      UserError: the groups differ in size.
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
        # Devices of a single slice that is only compiled for have no index.
        return 0 if device.platform == "tpu" else device.process_index
    return index


def _order(device: Any) -> tuple[int, int, int]:
    return _island(device), device.process_index, device.id


def place(devices: Sequence[Any], shape: tuple[int, ...]) -> np.ndarray:
    """Arranges the devices as an array of `shape`: replica, fsdp, tensor.

    On TPU, `fsdp` and `tensor` stay inside a slice. There JAX assigns devices to the torus, unless
    its assignment lets `tensor` cross processes without need. On other platforms devices are in
    the order of islands and processes: an axis crosses them only if it does not fit into one.

    Raises:
      UserError: `fsdp` or `tensor` would cross slices of a TPU, or `tensor` would cross processes.
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
    """Returns JAX's assignment to the torus of a slice, without split physical axes if possible."""
    try:
        array = mesh_utils.create_device_mesh(shape, devices)
    except NotImplementedError:
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return _in_order(devices, shape) if _tensor_leaves_process(array) else array


def _tensor_leaves_process(array: np.ndarray) -> bool:
    processes = np.vectorize(lambda device: device.process_index, otypes=[int])(array)
    return bool((processes != processes[..., :1]).any())

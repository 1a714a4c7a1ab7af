"""Devices that are not there, for meshes of any size and shape that nothing runs on."""

import dataclasses

import numpy as np
from jax.sharding import Mesh

from vlp_jax.parallel.mesh import AXES


@dataclasses.dataclass(frozen=True)
class Device:
    """What placement and shardings ask of a device."""

    id: int
    process_index: int = 0
    slice_index: int | None = None
    platform: str = "gpu"
    device_kind: str = "none"


def devices(count, per_process=8, per_slice=None, **more):
    """`count` devices, dealt to processes and, if `per_slice` is set, to slices in their order."""
    return [
        Device(i, i // per_process, None if per_slice is None else i // per_slice, **more)
        for i in range(count)
    ]


def mesh(*shape):
    """A mesh of fake devices: replica, fsdp, tensor."""
    array = np.empty(int(np.prod(shape)), object)
    array[:] = devices(array.size)
    return Mesh(array.reshape(shape), AXES)

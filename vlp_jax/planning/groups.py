"""The devices that a collective joins, and the axes of the mesh along which they lie.

XLA writes the groups in one of three forms (openxla/xla, xla/hlo/ir/replica_group.h,
collective_device_list.h and mesh_and_axis.h): as lists, `{{0,1},{2,3}}`; as a reshaped and
transposed row of numbers, `[2,4]<=[4,2]T(1,0)`; by the axes of a mesh of its own,
`mesh['a'=2,'b'=4] {'b'}`. The numbers are places in the mesh that the program is compiled for.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

Groups = list[list[int]]

_LISTS = re.compile(r"replica_groups=(\{(?:\{[\d,]*\},?)*\})")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_MESH = re.compile(
    r"replica_groups=(?:@\w+ )?mesh\[([^\]]*)\]"
    r"(?:, device_ids=\((?:\[([\d,]+)\])?(?:T\(([\d,]+)\))?\))? \{([^}]*)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}")


def parse_groups(attributes: str, devices: int) -> Groups:
    """Reads the groups of a collective; for a permutation the pairs of source and target.

    Args:
      attributes: what follows the operands of the instruction.
      devices: of the mesh, all of which an empty list means.

    Raises:
      ValueError: there are no groups in a form that is known.
    """
    # A permutation has no replica_groups at all.
    pairs = _PAIRS.search(attributes)
    if pairs:
        return [_numbers(pair) for pair in re.findall(r"\{([\d,]+)\}", pairs.group(1))]
    lists = _LISTS.search(attributes)
    if lists:
        groups = [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", lists.group(1))]
        # `{}` is short for one group of all devices.
        return groups or [list(range(devices))]
    iota = _IOTA.search(attributes)
    if iota:
        return _iota(iota.group(2), iota.group(3)).reshape(_numbers(iota.group(1))).tolist()
    mesh = _MESH.search(attributes)
    if mesh:
        return _mesh_groups(*mesh.groups())
    raise ValueError(f"groups of devices in no known form: {attributes[:200]}")


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    shape = _numbers(dims)
    array = np.arange(math.prod(shape)).reshape(shape)
    return array.transpose(_numbers(permutation)) if permutation else array


def _mesh_groups(axes: str, dims: str | None, permutation: str | None, along: str) -> Groups:
    """Makes groups along axes or parts of axes: `'a':(2)4` is the 4 of an a of 2 x 4 x ..."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    parts = {
        name: (int(before), int(size)) if before else (1, sizes[name])
        # A part `(before)size` is a slice of an axis: `before` is the product of the parts to its
        # left.
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", along)
    }
    shape, joined = [], []
    for name, size in sizes.items():
        before, width = parts.get(name, (1, 1))
        if name in parts:
            joined.append(len(shape) + 1)
        # Each axis becomes three: the parts left of the joined one, the joined one, and the rest.
        shape += [before, width, size // (before * width)]
    devices = math.prod(sizes.values())
    array = (_iota(dims, permutation) if dims else np.arange(devices)).reshape(shape)
    others = [axis for axis in range(len(shape)) if axis not in joined]
    width = math.prod(shape[axis] for axis in joined)
    return array.transpose([*others, *joined]).reshape(-1, width).tolist()


def axes_of(groups: Sequence[Sequence[int]], mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    """Returns the axes along which the devices of a group differ; () for groups of one.

    Args:
      groups: places in the mesh, whose last axis is the fastest.
      mesh_shape: name -> size of each axis of the mesh, in order.
    """
    # [axes, groups, devices of a group]
    places = np.array(np.unravel_index(_rectangle(groups), tuple(mesh_shape.values())))
    differ = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, here in zip(mesh_shape, differ, strict=True) if here)


def _rectangle(groups: Sequence[Sequence[int]]) -> np.ndarray:
    """Fills up groups of unequal size with their first device."""
    width = max(len(group) for group in groups)
    # A repeated device changes no difference within its group.
    return np.array([[*group, *group[:1] * (width - len(group))] for group in groups])

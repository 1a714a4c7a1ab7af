"""The traffic of a compiled program between devices: collectives by kind and axis, and their time.

XLA writes the groups of devices in one of three forms (openxla/xla, xla/hlo/ir/replica_group.h,
collective_device_list.h and mesh_and_axis.h): as lists, `{{0,1},{2,3}}`; as a reshaped and
transposed row of numbers, `[2,4]<=[4,2]T(1,0)`; by the axes of a mesh of its own,
`mesh['a'=2,'b'=4] {'b'}`. The numbers are places in the mesh that the program is compiled for.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.planning.hlo import Array, Computation, Instruction, Module
from vlp_jax.planning.loops import Runs
from vlp_jax.planning.target import Chip

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# A fusion of an all-reduce and a slice, in which each device keeps its part of the sum alone.
_REDUCE_SCATTER_FUSION = "all-reduce-scatter"


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective instruction of a step.

    Attributes:
      axes: of the mesh, along which it joins devices.
      payload_bytes: of the operands on a device, in one run of it.
      times: how often it runs in a step.
      groups: places in the mesh that it joins; pairs of source and target for a permutation.
      arrays: the larger of the arrays that a device sends and gets: the results of an all-gather,
        the operands of other kinds.
    """

    kind: str
    name: str
    axes: tuple[str, ...]
    payload_bytes: int
    times: float
    groups: Groups
    arrays: tuple[Array, ...] = ()

    @property
    def group_size(self) -> int:
        """Number of devices that take part together."""
        return max(len(group) for group in self.groups)

    @property
    def sent_bytes(self) -> float:
        """Bytes that a device sends in one run, in a ring: the least that the kind allows.

        With n devices and b bytes of operands: b (n - 1) for an all-gather, whose operand is a
        part; b (n - 1) / n for a reduce-scatter and an all-to-all; twice that for an all-reduce
        (Thakur et al. 2005); b for a permutation.
        """
        size, payload = self.group_size, self.payload_bytes
        share = (size - 1) / size
        return {
            "all-gather": payload * (size - 1),
            "all-reduce": 2 * payload * share,
            "reduce-scatter": payload * share,
            "all-to-all": payload * share,
            "collective-permute": payload,
        }[self.kind]

    @property
    def step_bytes(self) -> float:
        """Bytes that a device sends in a step."""
        return self.times * self.sent_bytes


def collectives(module: Module, runs: Runs, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """Lists the collectives of a program that join at least two devices.

    A collective that the TPU compiler lets several kernels carry along, one after the other, stands
    in each of them with one number of a chain; it counts once in the computation that runs them.
    """
    found = []
    for running, times in runs.running(module):
        # Numbers of chains are unique within the computation that runs the kernels.
        seen: set[str | None] = set()
        for computation, instruction in _within(module, running):
            kind = _kind(computation, instruction)
            chain = instruction.attribute(r'chain_id="(\d+)"')
            if chain is not None and chain in seen:
                continue
            seen.add(chain)
            groups = parse_groups(instruction.attributes, module.partitions)
            axes = axes_of(groups, mesh_shape)
            # A group of one device sends nothing; XLA leaves such collectives in.
            if axes:
                payload = _payload(computation, instruction)
                arrays = _whole(computation, instruction)
                name = instruction.name
                found.append(Collective(kind, name, axes, payload, times, groups, arrays))
    return found


def _within(module: Module, computation: Computation) -> Iterator[tuple[Computation, Instruction]]:
    """Yields the collectives of a computation and of the kernels that it runs."""
    for instruction in computation.instructions:
        if instruction.opcode.removesuffix("-start") in KINDS:
            yield computation, instruction
        elif instruction.opcode == "fusion":
            yield from _within(module, module.computations[instruction.called["calls"][0]])


def _kind(computation: Computation, instruction: Instruction) -> str:
    kind = instruction.opcode.removesuffix("-start")
    # The name of the fusion is the only trace of it in the text.
    if kind == "all-reduce" and computation.name.startswith(_REDUCE_SCATTER_FUSION):
        return "reduce-scatter"
    return kind


def _payload(computation: Computation, instruction: Instruction) -> int:
    operands = (computation.by_name[name] for name in instruction.operands)
    return sum(array.bytes for operand in operands for array in operand.arrays)


def _whole(computation: Computation, instruction: Instruction) -> tuple[Array, ...]:
    count = len(instruction.operands)
    if instruction.opcode == "all-gather-start":  # it gives operands and results
        return instruction.arrays[count : 2 * count]
    if instruction.opcode == "all-gather":
        return instruction.arrays
    return tuple(a for name in instruction.operands for a in computation.by_name[name].arrays)


def gathered_rows(
    found: list[Collective],
    rows: int,
    width: int,
    devices: int,
    other_shapes: Collection[tuple[int, ...]] = (),
) -> list[str]:
    """Lists the collectives that bring a device the rows of the others, of [rows, width] each.

    It is an all-gather of n x `rows` rows, n above 1. Or it is an all-reduce of the rows of all
    `devices`, which the TPU compiler sometimes makes of a gather. The order of dimensions, and
    dimensions of one, do not matter.

    Args:
      rows: that a device has of its own.
      other_shapes: of parameters; a collective of such a shape may be of these, and says so.

    Returns:
      Kind, shape and runs of each, in words.
    """
    # Layouts transpose freely: shapes are compared without their order.
    others = {tuple(sorted(size for size in shape if size != 1)) for shape in other_shapes}
    told = []
    for one in found:
        for array in one.arrays if one.kind in ("all-gather", "all-reduce") else ():
            dims = tuple(sorted(size for size in array.dims if size != 1))
            if len(dims) != 2 or width not in dims:
                continue
            length = sum(dims) - width
            # The rows of one device alone are its own: nothing was gathered.
            several = length % rows == 0 and length > rows
            if length == rows * devices or (several and one.kind == "all-gather"):
                shape = ",".join(map(str, array.dims))
                doubt = " (or of parameters: another --batch-per-chip tells)"
                line = f"{one.kind} {array.dtype}[{shape}] x {one.times:g}"
                told.append(line + (doubt if dims in others else ""))
    return told


def by_kind_and_axis(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Returns kind -> axes -> bytes that a device sends in a step."""
    table: dict[str, dict[str, float]] = {}
    for one in found:
        row = table.setdefault(one.kind, {})
        axes = "+".join(one.axes)
        row[axes] = row.get(axes, 0.0) + one.step_bytes
    return table


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


def network_seconds(
    found: Sequence[Collective], devices: Sequence[Any], chip: Chip
) -> float | None:
    """Returns the time of all collectives of a step, one after the other; None if not known.

    Latencies are left out, and so is what shares a link at the same time.

    Args:
      devices: of the mesh, in its order.
    """
    rates = [bandwidth(collective, devices, chip) for collective in found]
    if None in rates:
        return None
    return sum((one.step_bytes / rate for one, rate in zip(found, rates, strict=True)), 0.0)


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

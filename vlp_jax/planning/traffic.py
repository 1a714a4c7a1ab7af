"""The traffic of a compiled program between devices: collectives by kind and axis of the mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping

from vlp_jax.planning.groups import Groups, axes_of, parse_groups
from vlp_jax.planning.hlo import Array, Computation, Instruction, Module
from vlp_jax.planning.loops import Runs

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
    for name in module.computations:
        if name not in runs.times or name in runs.fused:
            continue
        # Numbers of chains are unique within the computation that runs the kernels.
        seen: set[str | None] = set()
        for computation, instruction in _within(module, module.computations[name]):
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
                times = runs.times[name]
                arrays = _whole(computation, instruction)
                found.append(
                    Collective(kind, instruction.name, axes, payload, times, groups, arrays)
                )
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

"""Bytes that the kernels of a compiled program move to and from main memory, and their cycles.

Every kernel of the program reads its operands and writes its results; what stays in memory nearer
the cores does not count, nor does an instruction that only gives another name to data. Tiles count
with their padding. Of a large array of which a kernel takes or replaces a slice the slice counts.
A collective that kernels carry along while they compute counts once, where it starts.

The TPU compiler writes `estimated_cycles` beside its own kernels, and nothing beside a Pallas call,
which is a custom call with the target `tpu_custom_call`. Here such a call takes the time of its
roofline: the longer of its FLOPs at the peak of the matrix units and its bytes at the bandwidth of
main memory. That is a bound and no estimate: work of the vector units, and the start of each
instance of the grid, are not in it.
"""

from __future__ import annotations

import dataclasses
import re

from vlp_jax.planning.hlo import Array, Computation, Instruction, Module
from vlp_jax.planning.loops import Runs
from vlp_jax.planning.target import Chip

HBM = 0  # XLA's memory space
# Nothing moves, or what moves is counted where the call or the start of it is.
_FREE = {
    *("parameter", "constant", "get-tuple-element", "tuple", "bitcast", "while", "conditional"),
    *("call", "after-all", "partition-id", "replica-id", "opt-barrier"),
}
_FREE_CALLS = ("AllocateBuffer", "ConcatBitcast", "AssumeGatherIndicesInBound")
_SLICES = {"dynamic-slice", "slice", "gather"}
_VIEWS = {"bitcast", "reshape"}
_UPDATE = "dynamic-update-slice"
_COLLECTIVE_START = "async-collective-start"  # the TPU compiler's name for such a fusion
_CARRIED = "chain_id="  # what it writes beside a collective that several kernels carry


def hbm_bytes(module: Module, runs: Runs) -> float:
    """Returns the bytes that a device reads and writes in one call of the program."""
    return sum(
        times * sum(moved_bytes(module, computation, i) for i in computation.instructions)
        for computation, times in runs.running(module)
    )


def estimated_cycles(module: Module, runs: Runs) -> float:
    """Returns the TPU compiler's estimate for its kernels, without waits for the network."""
    total = 0.0
    for computation, times in runs.running(module):
        said = (i.attribute(r'"estimated_cycles":"?(\d+)') for i in computation.instructions)
        total += times * sum(int(cycles) for cycles in said if cycles)
    return total


def moved_bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    """Returns the bytes that one run of an instruction reads and writes in main memory."""
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith("-done"):
        return 0
    if opcode == "custom-call" and any(name in instruction.attributes for name in _FREE_CALLS):
        return 0
    # slice-start copies a slice to or from memory near the cores: both ends are in its result.
    if opcode.removesuffix("-start") == "slice" and opcode != "slice":
        source, target = instruction.arrays[0], instruction.arrays[1]
        return target.padded_bytes * sum(array.memory == HBM for array in (source, target))
    if opcode.endswith("-start"):  # its result holds operands and results
        return _in_hbm(instruction.arrays)
    if opcode in _SLICES:
        source = computation.by_name[instruction.operands[0]].arrays[0]
        read = instruction.arrays[0].padded_bytes if source.memory == HBM else 0
        return read + _in_hbm(instruction.arrays)
    if opcode == _UPDATE:
        update = computation.by_name[instruction.operands[1]].arrays
        written = update[0].padded_bytes if instruction.arrays[0].memory == HBM else 0
        return written + _in_hbm(update)
    if opcode == "fusion":
        return _fusion(module, computation, instruction)
    # An operand that is given twice is read once.
    operands = (computation.by_name[name] for name in dict.fromkeys(instruction.operands))
    return _in_hbm(instruction.arrays) + sum(_in_hbm(operand.arrays) for operand in operands)


def _in_hbm(arrays: tuple[Array, ...]) -> int:
    return sum(array.padded_bytes for array in arrays if array.memory == HBM)


def _fusion(module: Module, computation: Computation, fusion: Instruction) -> int:
    # Its results hold the operands too, which the network reads.
    if fusion.name.startswith(_COLLECTIVE_START):
        return _in_hbm(fusion.arrays)
    inner = module.computations[fusion.called["calls"][0]]
    total = 0
    for number, name in enumerate(fusion.operands):
        arrays = computation.by_name[name].arrays
        if len(arrays) == 1 and arrays[0].memory == HBM:
            total += _read(module, inner, inner.parameters[number].name, arrays[0].padded_bytes)
    # In-place updates write the update alone: the rest of the result is the operand's memory.
    written = _written(module, inner, inner.root.name)
    # Nested tuples are in one row in `arrays` and may not pair up: then all of the results count.
    if len(written) != len(fusion.arrays):
        return total + _in_hbm(fusion.arrays)
    for array, part in zip(fusion.arrays, written, strict=True):
        if array.memory == HBM:
            total += array.padded_bytes if part is None else min(part, array.padded_bytes)
    return total


def _read(module: Module, computation: Computation, name: str, whole: int) -> int:
    """Returns the bytes that a kernel reads of the value `name`, which has `whole` bytes."""
    total = 0
    if computation.root.name == name:
        return whole
    for user in computation.users.get(name, ()):
        # Only the first operand of a slice or update is sliced; the others are indices or the
        # update.
        first = user.operands[0] == name and user.operands.count(name) == 1
        if user.opcode in _SLICES and first:
            total += user.arrays[0].padded_bytes
        elif user.opcode == _UPDATE and first:
            continue  # what is not replaced stays where it is
        elif user.opcode == "tuple" or _CARRIED in user.attributes:
            continue
        elif user.opcode in _VIEWS:
            total += _read(module, computation, user.name, whole)
        elif user.opcode == "fusion":
            inner = module.computations[user.called["calls"][0]]
            for number, operand in enumerate(user.operands):
                if operand == name:
                    total += _read(module, inner, inner.parameters[number].name, whole)
        else:
            return whole
    # Overlapping slices of one array come from main memory once.
    return min(total, whole)


def _written(module: Module, computation: Computation, name: str) -> list[int | None]:
    """Returns the bytes that a kernel writes of each of its results; None for all of one."""
    instruction = computation.by_name[name]
    if instruction.opcode == "tuple":
        parts = (_written(module, computation, operand) for operand in instruction.operands)
        return [part for one in parts for part in one]
    if instruction.opcode == "parameter" or _CARRIED in instruction.attributes:
        return [0] * len(instruction.arrays)  # it is handed on as it is
    if instruction.opcode in _VIEWS:
        return _written(module, computation, instruction.operands[0])
    if instruction.opcode == "fusion":
        inner = module.computations[instruction.called["calls"][0]]
        return _written(module, inner, inner.root.name)
    if instruction.opcode == _UPDATE:
        return [computation.by_name[instruction.operands[1]].arrays[0].padded_bytes]
    return [None] * len(instruction.arrays)


TARGET = 'custom_call_target="tpu_custom_call"'
# `pl.CostEstimate` in the backend_config of the call, as jax writes it.
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_OWN_ESTIMATE = '"estimated_cycles":'


@dataclasses.dataclass(frozen=True)
class PallasCalls:
    """The Pallas calls of a device in one call of the program, summed.

    Attributes:
      runs: how often one of them runs.
      flops: by their cost estimates.
      bytes: by their cost estimates; operands and results of a call without one.
      seconds: each call at its roofline, one after the other.
      uncosted: names of the calls without a cost estimate, whose FLOPs are not in it.
    """

    runs: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    uncosted: tuple[str, ...] = ()

    def cycles(self, clock: float | None) -> float:
        """Returns the seconds in cycles of the cores; 0 if their clock is not known."""
        return self.seconds * clock if clock else 0.0

    def notes(self, clock: float | None) -> tuple[str, ...]:
        """Returns notes on the calls for a reader."""
        if not self.runs:
            return ()
        how = "are in the cycles (+) at their roofline, which is the least they can take"
        if not clock:
            how = "are not in the cycles (+), for the clock of this kind is not known"
        found = [f"{self.runs:,.0f} runs of Pallas kernels {how}: the compiler does not price them"]
        if self.uncosted:
            found.append(
                f"{len(self.uncosted)} Pallas calls have no cost estimate (pl.CostEstimate): of "
                f"these only operands and results count: {', '.join(self.uncosted[:3])}"
            )
        return tuple(found)


def pallas_calls(module: Module, runs: Runs, chip: Chip, dtype: str) -> PallasCalls:
    """Sums the Pallas calls of `module` for which the compiler gives no cycles of its own.

    Args:
      dtype: of the products in the kernels, for the peak.
    """
    peak = chip.peak_flops(dtype)
    total = PallasCalls()
    for name, computation in module.computations.items():
        # A computation that never runs has no times, and its calls cost nothing.
        times = runs.times.get(name, 0.0)
        for instruction in computation.instructions if times else ():
            text = instruction.attributes
            if instruction.opcode != "custom-call" or TARGET not in text or _OWN_ESTIMATE in text:
                continue
            said = _cost(instruction)
            flops, moved = said if said else (0.0, _operands_and_results(computation, instruction))
            total = PallasCalls(
                total.runs + times,
                total.flops + times * flops,
                total.bytes + times * moved,
                total.seconds + times * max(flops / peak, moved / chip.hbm_bandwidth),
                total.uncosted if said else (*total.uncosted, instruction.name),
            )
    return total


def _cost(instruction: Instruction) -> tuple[float, float] | None:
    """Returns (FLOPs, bytes) that the kernel's author gave; None if they gave none."""
    found = _COST.search(instruction.attributes)
    if found is None:
        return None
    # Protobuf's JSON quotes an int64.
    fields = dict(re.findall(r'"(\w+)":"?(-?\d+)', found.group(1)))
    return float(fields.get("flops", 0)), float(fields.get("bytes_accessed", 0))


def _operands_and_results(computation: Computation, call: Instruction) -> float:
    """Returns the bytes of operands and results, once each, in place of a cost estimate."""
    operands = (computation.by_name[name].arrays for name in dict.fromkeys(call.operands))
    arrays = (*call.arrays, *(array for one in operands for array in one))
    return float(sum(array.padded_bytes for array in arrays))

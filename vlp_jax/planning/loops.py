"""Counts how often each computation of a compiled program runs in one call of it."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

from vlp_jax.planning.hlo import Computation, Instruction, Module

# A fusion is one kernel: what it calls is no program of its own.
_FUSED = "fusion"
# They name the computation that the instruction they belong to has started.
_CONTINUES = {"async-update", "async-done"}
# Instructions that give on what they take, as far as the value of a counter is concerned.
_SAME_VALUE = {"copy", "bitcast", "convert", "copy-start", "copy-done", "reshape"}


@dataclasses.dataclass(frozen=True)
class Runs:
    """Counts of the runs of computations.

    Attributes:
      times: name of a computation -> how often it runs; fused ones are counted as often as the
        fusions that they belong to.
      fused: names of computations that run inside a kernel.
      unknown: loops whose number of rounds could not be found; they count as one round.
    """

    times: dict[str, float]
    fused: frozenset[str]
    unknown: tuple[str, ...]

    def running(self, module: Module) -> Iterator[tuple[Computation, float]]:
        """Yields the computations that run outside of kernels, and how often each runs."""
        for name, computation in module.computations.items():
            if name in self.times and name not in self.fused:
                yield computation, self.times[name]


def count_runs(module: Module) -> Runs:
    """Follows the calls of `module` from its entry. Of the branches of a conditional all count."""
    times: dict[str, float] = {}
    fused: set[str] = set()
    unknown: dict[str, None] = {}

    def visit(name: str, factor: float, inside: bool) -> None:
        times[name] = times.get(name, 0) + factor
        if inside:
            fused.add(name)
        for instruction in module.computations[name].instructions:
            # Its start has been counted: a second visit would count the computation twice.
            if instruction.opcode in _CONTINUES:
                continue
            rounds = 1.0
            if instruction.opcode == "while":
                known = trip_count(module, module.computations[name], instruction)
                if known is None:
                    unknown[instruction.name] = None
                rounds = 1.0 if known is None else known
            for role, called in instruction.called.items():
                if role == "to_apply" and instruction.opcode != "call":
                    continue  # what a reduction or a sort does with two elements
                kernel = inside or instruction.opcode == _FUSED
                for computation in called:
                    # The condition runs once more than the body; it is scalar work, and counts
                    # once.
                    visit(computation, factor * (rounds if role != "condition" else 1), kernel)

    visit(module.entry, 1.0, False)
    return Runs(times, frozenset(fused), tuple(unknown))


def trip_count(module: Module, around: Computation, loop: Instruction) -> float | None:
    """Returns the rounds of a while loop; None if they depend on more than constants.

    XLA says it for CPU and GPU. For TPU it follows from the loop itself, which has to count in
    steps of a constant from a constant to a constant.
    """
    said = loop.attribute(r'"known_trip_count":\{"n":"(\d+)"')
    if said is not None:
        return float(said)
    condition = module.computations[loop.called["condition"][0]]
    body = module.computations[loop.called["body"][0]]
    test = _comparison(module, condition)
    if test is None:
        return None
    index, bound, direction = test
    # The bound itself may be carried by the loop, and set once before it.
    if isinstance(bound, _Element):
        bound = _element(around, loop, bound.index)
    start = _element(around, loop, index)
    step = _step(module, body, index)
    if start is None or step is None or bound is None or step <= 0:
        return None
    # Rounds of counter = start, start + step, ... while it is below `last`, rounded up.
    last = bound + 1 if direction == "LE" else bound
    return float(max(0, -(-(last - start) // step)))


@dataclasses.dataclass(frozen=True)
class _Element:
    """An element of the tuple that a loop carries."""

    index: int


def _comparison(module: Module, condition: Computation) -> tuple[int, int | _Element, str] | None:
    """Returns (index of the counter, its bound, "LT" or "LE") of "counter < bound"."""
    root, values = _operation(module, condition, condition.root)
    direction = root.attribute(r"direction=(\w+)")
    if root.opcode != "compare" or len(values) != 2 or None in values:
        return None
    left, right = values
    if direction in ("GT", "GE"):
        # "bound > counter" is "counter < bound".
        left, right, direction = right, left, {"GT": "LT", "GE": "LE"}[direction]
    if direction not in ("LT", "LE") or not isinstance(left, _Element):
        return None
    return left.index, right, direction


def _operation(
    module: Module, computation: Computation, instruction: Instruction
) -> tuple[Instruction, list[int | _Element | None]]:
    """Returns an instruction with its operands' values; for a fusion the last one inside."""
    values = [_value(computation, name) for name in instruction.operands]
    if instruction.opcode != _FUSED:
        return instruction, values
    inner = module.computations[instruction.called["calls"][0]]
    operands = [_origin(inner, name) for name in inner.root.operands]
    return inner.root, [
        values[int(one.literal)] if one.opcode == "parameter" else _value(inner, one.name)
        for one in operands
    ]


def _origin(computation: Computation, name: str) -> Instruction:
    """Returns the instruction that a value comes from, behind copies of it."""
    instruction = computation.by_name[name]
    while instruction.opcode in _SAME_VALUE:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _value(computation: Computation, name: str) -> int | _Element | None:
    instruction = _origin(computation, name)
    if instruction.opcode == "constant":
        return int(instruction.literal) if re.fullmatch(r"-?\d+", instruction.literal) else None
    if instruction.opcode == "get-tuple-element":
        source = _origin(computation, instruction.operands[0])
        if source.opcode == "parameter":
            return _Element(int(instruction.attribute(r"index=(\d+)")))
    return None


def _element(around: Computation, loop: Instruction, index: int) -> int | None:
    """Returns the first value of element `index` of the carried tuple, if it is a constant."""
    start = _origin(around, loop.operands[0])
    if start.opcode != "tuple":
        return None
    value = _value(around, start.operands[index])
    return value if isinstance(value, int) else None


def _step(module: Module, body: Computation, index: int) -> int | None:
    """Returns the number that a round adds to element `index`; None if it is no constant."""
    root = _origin(body, body.root.name)
    if root.opcode != "tuple":
        return None
    new, values = _operation(module, body, _origin(body, root.operands[index]))
    if new.opcode != "add" or _Element(index) not in values:
        return None
    other = values[1 - values.index(_Element(index))]
    return other if isinstance(other, int) else None

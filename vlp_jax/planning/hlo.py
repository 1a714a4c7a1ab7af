"""Parses the text of a compiled XLA program, as `compiled.as_text()` gives it.

Only what a plan asks for is read: shapes with their memory and tiles, operands, called
computations, and how often each computation runs. XLA's HloPrinter writes the format
(openxla/xla, xla/hlo/ir/hlo_instruction.cc), with the layouts of xla/layout.cc.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property

# Bits of an element; `xla/primitive_util.h`. A "token" and an "opaque" hold nothing.
# Types whose name has no width in it.
_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_ARRAY = re.compile(r"(?P<dtype>[a-z]\w*)\[(?P<dims>[^\]]*)\](?:\{(?P<layout>[^{}]*)\})?")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|condition|body|true_computation|false_computation|branch_computations)="
    r"(\{[^}]*\}|%[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program, as it lies in memory.

    Attributes:
      memory: XLA's memory space; 0 is a device's main memory (HBM), others are nearer its cores.
      minor_to_major: dimensions from the fastest on; empty if the text does not say.
      tile: sizes that the last dimensions of the layout are padded to; empty for no tiles.
    """

    dtype: str
    dims: tuple[int, ...]
    memory: int = 0
    minor_to_major: tuple[int, ...] = ()
    tile: tuple[int, ...] = ()

    @property
    def bits(self) -> int:
        """Bits of an element."""
        if self.dtype in _BITS:
            return _BITS[self.dtype]
        return int(re.search(r"\d+", self.dtype).group())  # f32, bf16, s4, f8e4m3fn

    @property
    def bytes(self) -> int:
        """Bytes of the elements alone."""
        return math.prod(self.dims) * self.bits // 8

    @property
    def padded_bytes(self) -> int:
        """Bytes with the padding of tiles: on a TPU, bf16[8,64] takes as much as bf16[8,128]."""
        # Row-major, where the text has no layout.
        order = self.minor_to_major or tuple(reversed(range(len(self.dims))))
        dims = [self.dims[index] for index in order]
        # A tile names the slowest of its dimensions first, and `dims` starts with the fastest.
        for index, size in enumerate(reversed(self.tile)):
            if index < len(dims):
                dims[index] = -(-dims[index] // size) * size
        return math.prod(dims) * self.bits // 8


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      arrays: its results; several for a tuple, nested ones in one row.
      operands: names of instructions of the same computation.
      literal: the text in the parentheses: the value of a constant, the number of a parameter.
      attributes: the rest of the line.
    """

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    literal: str
    attributes: str
    is_root: bool = False

    @cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Role ("body", "calls", ...) -> names of the computations that it calls."""
        found = _CALLED.findall(self.attributes)
        return {role: tuple(_NAME.findall(names)) for role, names in found}

    def attribute(self, pattern: str) -> str | None:
        """The first group of `pattern` in the attributes; None if it does not occur."""
        found = re.search(pattern, self.attributes)
        return found.group(1) if found else None


@dataclasses.dataclass(frozen=True)
class Computation:
    """A list of instructions in the order in which they run, if the program is scheduled."""

    name: str
    instructions: tuple[Instruction, ...]

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        """The instructions by name."""
        return {instruction.name: instruction for instruction in self.instructions}

    @cached_property
    def users(self) -> dict[str, list[Instruction]]:
        """Name -> the instructions that take it."""
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    @cached_property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next((i for i in self.instructions if i.is_root), self.instructions[-1])

    @cached_property
    def parameters(self) -> dict[int, Instruction]:
        """Number -> parameter."""
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name, and the name of the first."""

    computations: dict[str, Computation]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Parses a program.

    Raises:
      ValueError: it has no entry computation, or a line in a computation is none.
    """
    computations: dict[str, Computation] = {}
    entry, name, lines = None, None, []
    for line in text.splitlines():
        if name is None:
            # The head of a computation is the one line outside of any that ends in a brace.
            head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line)
            if head:
                name, lines = head.group(2), []
                entry = name if head.group(1) else entry
        elif line.startswith("}"):
            computations[name], name = Computation(name, tuple(lines)), None
        elif line.strip():
            lines.append(parse_instruction(line))
    if entry is None:
        raise ValueError("the text of the program has no ENTRY computation")
    # The first line names the program and has its settings; later ones may mention the word.
    partitions = re.search(r"num_partitions=(\d+)", text[: text.find("\n")])
    return Module(computations, entry, int(partitions.group(1)) if partitions else 1)


def parse_instruction(line: str) -> Instruction:
    """Parses one line of a computation.

    Raises:
      ValueError: it is none.
    """
    head = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if head is None:
        raise ValueError(f"not an instruction: {line.strip()[:80]}")
    rest = line[head.end() :]
    # A tuple's shape has spaces and parentheses of its own.
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    inside = rest[opening + 1 : closing]
    return Instruction(
        name=head.group(2),
        opcode=rest[:opening],
        arrays=tuple(_arrays(shape)),
        operands=tuple(_NAME.findall(inside)),
        literal=inside,
        attributes=rest[closing + 1 :],
        is_root=head.group(1) is not None,
    )


def _closing(text: str, opening: int) -> int:
    """Returns the place at which the parenthesis that opens at `opening` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis does not close: {text[:80]}")


def _arrays(shape: str) -> Iterator[Array]:
    # XLA numbers the elements of long tuples in comments: `/*index=5*/`.
    for found in _ARRAY.finditer(re.sub(r"/\*.*?\*/", "", shape)):
        layout = found["layout"] or ""
        order, _, rest = layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        space = re.search(r"S\((\d+)\)", rest)
        yield Array(
            dtype=found["dtype"],
            # `<=8` is a dimension of dynamic size, with its bound.
            dims=tuple(int(dim.strip("<=")) for dim in found["dims"].split(",") if dim),
            memory=int(space.group(1)) if space else 0,
            minor_to_major=tuple(int(i) for i in order.split(",") if i),
            tile=tuple(int(i) for i in tile.group(1).split(",")) if tile else (),
        )

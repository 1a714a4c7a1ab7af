"""FLOPs and bytes of the kernels of a compiled program, read off its text.

A kernel is an instruction that runs on a device by itself: a product, a fusion, a copy. FLOPs are
counted of matrix products and convolutions, a multiply-add as 2. Bytes are the least that a kernel
has to read and write in the device's main memory, each operand once: of an operand that is only
sliced, the slice; of one that is updated in place, the update.
"""

from __future__ import annotations

import dataclasses
import math
import re

from vlp_jax.planning.hlo import Computation, Instruction, Module
from vlp_jax.planning.loops import count_runs

# Instructions that are no kernels: they hold others, or cost nothing.
CONTAINERS = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_SLICES = {"dynamic-slice", "slice", "gather"}
# Kernels of libraries that XLA's GPU compiler calls; openxla/xla, xla/service/gpu/cublas_cudnn.cc.
_CUBLAS = re.compile(r'custom_call_target="__cublas\$')
_CONTRACTED = re.compile(r'"lhs_contracting_dimensions":\[([^\]]*)\]')
# Custom calls that only mark something, or do no products.
_NO_PRODUCTS = re.compile(r'custom_call_target="(Sharding|SPMD|TopK|AllocateBuffer|PartialReduce)')


@dataclasses.dataclass(frozen=True)
class KernelCost:
    """One run of one kernel.

    Attributes:
      flops: None if it calls a library in a way that is not known here.
      what: the name that JAX gave what it computes; empty if it has none.
    """

    opcode: str
    flops: float | None
    bytes: int
    what: str


def kernel_costs(module: Module) -> dict[str, KernelCost]:
    """Returns name of an instruction -> the cost of one run, for all kernels that run."""
    runs = count_runs(module)
    costs = {}
    for name in runs.times:
        if name in runs.fused:
            continue
        computation = module.computations[name]
        for instruction in computation.instructions:
            if instruction.opcode not in CONTAINERS | _FREE:
                costs[instruction.name] = KernelCost(
                    instruction.opcode,
                    _flops(module, computation, instruction),
                    _bytes(module, computation, instruction),
                    _what(module, instruction),
                )
    return costs


def _flops(module: Module, computation: Computation, instruction: Instruction) -> float | None:
    if instruction.opcode == "dot":
        return _dot_flops(
            computation, instruction, instruction.attribute(r"lhs_contracting_dims=\{([\d,]*)\}")
        )
    if instruction.opcode == "convolution":
        return _convolution_flops(computation, instruction)
    if instruction.opcode == "custom-call":
        if _CUBLAS.search(instruction.attributes):
            dims = instruction.attribute(_CONTRACTED.pattern)
            return _dot_flops(computation, instruction, dims)
        return 0.0 if _NO_PRODUCTS.search(instruction.attributes) else None
    inner = [
        _flops(module, module.computations[name], one)
        for role, names in instruction.called.items()
        if role != "to_apply"
        for name in names
        for one in module.computations[name].instructions
    ]
    return None if None in inner else sum(inner)


def _dot_flops(
    computation: Computation, instruction: Instruction, contracted: str | None
) -> float | None:
    left = computation.by_name[instruction.operands[0]].arrays[0].dims
    if contracted is None:
        return None
    dims = [int(dim.strip('" ')) for dim in contracted.split(",") if dim.strip('" ')]
    return 2.0 * math.prod(instruction.arrays[0].dims) * math.prod(left[i] for i in dims)


def _convolution_flops(computation: Computation, instruction: Instruction) -> float | None:
    """Counts every place of the kernel on every place of the result."""
    labels = instruction.attribute(r"dim_labels=\w+_(\w+)->")
    if labels is None:
        return None
    kernel = computation.by_name[instruction.operands[1]].arrays[0].dims
    taps = math.prod(kernel) / kernel[labels.index("o")]
    return 2.0 * math.prod(instruction.arrays[0].dims) * taps


def _bytes(module: Module, computation: Computation, instruction: Instruction) -> int:
    sizes = [
        sum(array.bytes for array in computation.by_name[name].arrays)
        for name in instruction.operands
    ]
    written = sum(array.bytes for array in instruction.arrays)
    if instruction.opcode in _SLICES:
        return 2 * written
    if instruction.opcode == "dynamic-update-slice":
        return 2 * sizes[1]
    if instruction.opcode != "fusion":
        return sum(sizes) + written
    inner = module.computations[instruction.called["calls"][0]]
    read = sum(_read(inner, number, size) for number, size in enumerate(sizes))
    return read + _written(inner, written)


def _read(inner: Computation, number: int, size: int) -> int:
    """Returns the bytes that a fusion reads of its operand `number`, which has `size`."""
    parameter = inner.parameters.get(number)
    users = inner.users.get(parameter.name, []) if parameter else []
    total = 0
    for user in users:
        first = bool(user.operands) and user.operands[0] == parameter.name
        if user.opcode in _SLICES and first:
            total += user.arrays[0].bytes
        elif user.opcode == "dynamic-update-slice" and first:
            continue  # it is written to, where the update goes
        else:
            return size
    return min(total, size)


def _written(inner: Computation, size: int) -> int:
    """Returns the bytes that a fusion writes; its result has `size`."""
    root = inner.root
    while root.opcode in ("bitcast", "copy", "convert") and root.operands:
        root = inner.by_name[root.operands[0]]
    if root.opcode == "dynamic-update-slice":
        return inner.by_name[root.operands[1]].arrays[0].bytes
    return size


def _what(module: Module, instruction: Instruction) -> str:
    name = instruction.attribute(r'op_name="([^"]*)"')
    if name is None and "calls" in instruction.called:
        name = module.computations[instruction.called["calls"][0]].root.attribute(
            r'op_name="([^"]*)"'
        )
    return name or ""

"""FLOPs and bytes of the kernels of a compiled program, read off its text.

A kernel is an instruction that runs on a device by itself: a product, a fusion, a copy. FLOPs are
counted of matrix products and convolutions, a multiply-add as 2. Bytes are the least that a kernel
has to read and write in the device's main memory (`vlp_jax.planning.hbm`).
"""

from __future__ import annotations

import dataclasses
import math
import re

from vlp_jax.planning import hbm
from vlp_jax.planning.hlo import Computation, Instruction, Module
from vlp_jax.planning.loops import count_runs

# Instructions that are no kernels: they hold others, or cost nothing.
CONTAINERS = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
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
        # Its fusion is the kernel.
        if name in runs.fused:
            continue
        computation = module.computations[name]
        for instruction in computation.instructions:
            if instruction.opcode not in CONTAINERS | _FREE:
                costs[instruction.name] = KernelCost(
                    instruction.opcode,
                    _flops(module, computation, instruction),
                    hbm.moved_bytes(module, computation, instruction),
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
    # A fusion has the products of its computations; of a reduction, `to_apply` adds single numbers.
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
    # Every output value sums over the kernel without its output dimension.
    taps = math.prod(kernel) / kernel[labels.index("o")]
    return 2.0 * math.prod(instruction.arrays[0].dims) * taps


def _what(module: Module, instruction: Instruction) -> str:
    name = instruction.attribute(r'op_name="([^"]*)"')
    if name is None and "calls" in instruction.called:
        name = module.computations[instruction.called["calls"][0]].root.attribute(
            r'op_name="([^"]*)"'
        )
    return name or ""

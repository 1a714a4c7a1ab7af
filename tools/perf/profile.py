"""Traces a few steps and lists the dearest kernels, with FLOPs and bytes off the program's text.

A kernel is an instruction that runs on a device by itself: a product, a fusion, a copy. FLOPs are
counted of matrix products and convolutions, a multiply-add as 2. Bytes are the least that a kernel
has to read and write in the device's main memory (`vlp_jax.planning.hbm`).
"""

from __future__ import annotations

import dataclasses
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Group

from tools.perf import harness
from tools.perf.jax_step import JaxStep
from vlp_jax.errors import UserError
from vlp_jax.planning import hbm
from vlp_jax.planning.hlo import Computation, Instruction, Module, parse
from vlp_jax.planning.loops import count_runs

STEPS = 3
SHOWN = 10
HEADS = ("kernel", "what", "ms", "share", "calls", "GFLOP/s", "GB/s")
_ELSEWHERE = "(no operation of the step)"
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


@dataclasses.dataclass(frozen=True)
class Kernel:
    """All runs of one operation of the program in a trace.

    Attributes:
      name: the instruction of the compiled program.
      seconds: of all runs on all devices. On CPU, of threads.
      cost: None if the program's text has no such kernel.
    """

    name: str
    seconds: float
    calls: int
    cost: KernelCost | None

    @property
    def flops_per_second(self) -> float | None:
        """FLOP/s of the kernel; None if its FLOPs are not known."""
        if self.cost is None or self.cost.flops is None:
            return None
        return self.cost.flops * self.calls / self.seconds

    @property
    def bytes_per_second(self) -> float | None:
        """Bytes a second of the kernel; None if the program's text does not have it."""
        return None if self.cost is None else self.cost.bytes * self.calls / self.seconds


@dataclasses.dataclass(frozen=True)
class Profile:
    """Kernels, the dearest first.

    Attributes:
      step_seconds: wall time of the traced steps.
      elsewhere: seconds of device events that no operation of the program was found for, and
        seconds of operations by name that its text does not have.
    """

    kernels: tuple[Kernel, ...]
    step_seconds: float
    devices: int
    on_cpu: bool
    elsewhere: float

    @property
    def seconds(self) -> float:
        """Seconds of all kernels."""
        return sum(kernel.seconds for kernel in self.kernels) + self.elsewhere

    @property
    def unknown_flops(self) -> float:
        """Seconds of kernels whose FLOPs are not known."""
        return sum(k.seconds for k in self.kernels if k.cost and k.cost.flops is None)


def take_profile(step: JaxStep, directory: str) -> Profile:
    """Traces `STEPS` steps into `directory` and reads the trace.

    Raises:
      UserError: the directory cannot be written to.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # or Python is several times as slow
    before = set(_traces(directory))
    try:
        os.makedirs(directory, exist_ok=True)
        jax.profiler.start_trace(directory, profiler_options=options)
    except OSError as error:
        raise UserError(
            f"--profile {directory}: {error.strerror}; choose another folder"
        ) from error
    begin = time.perf_counter()
    step.run(STEPS)
    seconds = time.perf_counter() - begin
    jax.profiler.stop_trace()
    # The folder may hold traces of earlier runs; the profiler names its file by the time.
    (trace,) = set(_traces(directory)) - before
    costs = kernel_costs(parse(step.program.program.as_text()))
    mesh = step.setup.mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    return read_trace(trace, costs, seconds, mesh.size, on_cpu)


def _traces(directory: str) -> list[Path]:
    return sorted(Path(directory).rglob("*.xplane.pb"))


def read_trace(
    trace: Path, costs: Mapping[str, KernelCost], seconds: float, devices: int, on_cpu: bool
) -> Profile:
    """Reads the kernels in a trace.

    Args:
      costs: by the name of an operation.
      seconds: that the traced steps took.
    """
    times: dict[str, float] = {}
    calls: dict[str, int] = {}
    for name, duration in _events(jax.profiler.ProfileData.from_file(str(trace)), on_cpu):
        # A while loop's event spans the events of its body, which would count twice.
        if name.rpartition(".")[0] in CONTAINERS or name in CONTAINERS:
            continue
        times[name] = times.get(name, 0.0) + duration
        calls[name] = calls.get(name, 0) + 1
    elsewhere = times.pop(_ELSEWHERE, 0.0)
    kernels = [Kernel(n, s, calls[n], costs.get(n)) for n, s in times.items() if s > 0]
    kernels.sort(key=lambda kernel: -kernel.seconds)
    return Profile(tuple(kernels), seconds, devices, on_cpu, elsewhere)


def _events(data: jax.profiler.ProfileData, on_cpu: bool) -> Iterator[tuple[str, float]]:
    """Yields (operation, seconds) of each event of a device.

    On CPU an operation is an event of a thread, with the statistic "hlo_op"; on a GPU so is a
    kernel, on the line of its stream; a TPU has a line of operations, named by their text.
    """
    for plane in data.planes:
        device = plane.name.startswith("/device:")
        if not device and not (on_cpu and plane.name.startswith("/host:CPU")):
            continue
        for line in plane.lines:
            # Other lines of a device repeat the time as modules, steps or names of scopes.
            if device and not line.name.startswith(("Stream", "XLA Ops")):
                continue
            for event in line.events:
                name = _operation(event, line.name)
                if name or device:
                    yield name or _ELSEWHERE, event.duration_ns / 1e9


def _operation(event: Any, line: str) -> str | None:
    if line == "XLA Ops":
        found = re.match(r"%?([\w.\-]+)", event.name)
        return found.group(1) if found else None
    for key, value in event.stats:
        if key == "hlo_op":
            return str(value)
    return None


def as_json(profile: Profile) -> dict[str, Any]:
    """Returns all kernels, for `json.dumps`."""
    return {
        "step_seconds": profile.step_seconds / STEPS,
        "kernel_seconds": profile.seconds / STEPS,
        "elsewhere_seconds": profile.elsewhere / STEPS,
        "unknown_flops_seconds": profile.unknown_flops / STEPS,
        "kernels": [
            {
                "name": kernel.name,
                "seconds": kernel.seconds / STEPS,
                "share": kernel.seconds / profile.seconds,
                "calls": kernel.calls / STEPS,
                "flops_per_second": kernel.flops_per_second,
                "bytes_per_second": kernel.bytes_per_second,
                "opcode": kernel.cost.opcode if kernel.cost else None,
                "what": kernel.cost.what if kernel.cost else None,
            }
            for kernel in profile.kernels
        ],
    }


def as_table(profile: Profile) -> Group:
    """Returns a table of the dearest kernels, and remarks on the time without a kernel."""
    rows = [
        (
            *(kernel.name, _short(kernel.cost), f"{1e3 * kernel.seconds / STEPS:.2f}"),
            *(f"{kernel.seconds / profile.seconds:.1%}", f"{kernel.calls / STEPS:g}"),
            *(_rate(kernel.flops_per_second), _rate(kernel.bytes_per_second)),
        )
        for kernel in profile.kernels[:SHOWN]
    ]
    title = f"the {SHOWN} dearest kernels, of one step"
    return Group(harness.make_table(title, HEADS, rows), *_remarks(profile))


def _remarks(profile: Profile) -> Iterator[str]:
    whole = profile.seconds
    if not whole:
        yield "the trace has no event of an operation of the step: nothing can be attributed"
        return
    missing = sum(k.seconds for k in profile.kernels if k.cost is None)
    yield (
        f"attributed to operations of the program: {1 - (profile.elsewhere + missing) / whole:.1%} "
        f"of {1e3 * whole / STEPS:.1f} ms of kernels a step; of the rest, "
        f"{profile.elsewhere / whole:.1%} names no operation (copies, libraries) and "
        f"{missing / whole:.1%} one that the program's text does not have"
    )
    if profile.unknown_flops:
        yield f"FLOPs are not known of {profile.unknown_flops / whole:.1%} (those with a ?)"
    wall = profile.step_seconds * profile.devices
    if profile.on_cpu:
        yield (
            "on CPU the time is of threads, which run side by side and may wait for each "
            f"other: {whole / wall:.1f} of them at a time"
        )
    else:
        yield f"the devices are busy for {whole / wall:.1%} of {1e3 * wall / STEPS:.1f} ms a step"


def _short(cost: KernelCost | None) -> str:
    if cost is None:
        return "?"
    # Scans nest these words around the names of modules, which say more.
    parts = [p for p in cost.what.split("/") if p not in ("while", "body", "closed_call")]
    return f"{cost.opcode} {'/'.join(parts[-3:])}"[:60]


def _rate(value: float | None) -> str:
    return "?" if value is None else f"{value / 1e9:,.1f}"

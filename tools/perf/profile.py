"""Traces a few steps and lists the dearest kernels, as the compiled program names them."""

from __future__ import annotations

import dataclasses
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Group

from tools.perf import harness
from tools.perf.jax_step import JaxStep
from vlp_jax.errors import UserError
from vlp_jax.planning.hlo import Module, parse

STEPS = 3
SHOWN = 10
HEADS = ("kernel", "what", "ms", "share", "calls")
# Instructions that are no kernels: they hold others.
CONTAINERS = {"while", "conditional", "call", "async-start", "async-update", "async-done"}
_ELSEWHERE = "(no operation of the step)"


@dataclasses.dataclass(frozen=True)
class Profile:
    """Kernels of the traced steps, the dearest first.

    Attributes:
      kernels: (instruction of the program, its JAX name, seconds of all runs, number of runs). The
        seconds are of all devices; on CPU, of threads.
      step_seconds: wall time of the traced steps.
      elsewhere: seconds of device events that no operation of the program was found for.
    """

    kernels: tuple[tuple[str, str, float, int], ...]
    step_seconds: float
    devices: int
    on_cpu: bool
    elsewhere: float

    @property
    def seconds(self) -> float:
        """Seconds of all kernels."""
        return sum(kernel[2] for kernel in self.kernels) + self.elsewhere


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
    mesh = step.setup.mesh
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    names = _names(parse(step.program.program.as_text()))
    return _read_trace(trace, names, seconds, mesh.size, on_cpu)


def _traces(directory: str) -> list[Path]:
    return sorted(Path(directory).rglob("*.xplane.pb"))


def _names(module: Module) -> dict[str, str]:
    """Returns instruction -> its opcode and the end of the name that JAX gave what it computes."""
    names = {}
    for computation in module.computations.values():
        for instruction in computation.instructions:
            pattern, source = r'op_name="([^"]*)"', instruction
            if source.attribute(pattern) is None and "calls" in instruction.called:
                source = module.computations[instruction.called["calls"][0]].root
            # Scans nest these words around the names of modules, which say more.
            parts = (source.attribute(pattern) or "").split("/")
            parts = [part for part in parts if part not in ("while", "body", "closed_call")]
            names[instruction.name] = f"{instruction.opcode} {'/'.join(parts[-3:])}"[:60]
    return names


def _read_trace(
    trace: Path, names: Mapping[str, str], seconds: float, devices: int, on_cpu: bool
) -> Profile:
    times: dict[str, float] = defaultdict(float)
    calls: Counter[str] = Counter()
    for name, duration in _events(jax.profiler.ProfileData.from_file(str(trace)), on_cpu):
        # A while loop's event spans the events of its body, which would count twice.
        if name.rpartition(".")[0] not in CONTAINERS and name not in CONTAINERS:
            times[name] += duration
            calls[name] += 1
    elsewhere = times.pop(_ELSEWHERE, 0.0)
    kernels = [(name, names.get(name, "?"), s, calls[name]) for name, s in times.items() if s > 0]
    kernels.sort(key=lambda kernel: -kernel[2])
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
    return next((str(value) for key, value in event.stats if key == "hlo_op"), None)


def as_json(profile: Profile) -> dict[str, Any]:
    """Returns all kernels, for `json.dumps`."""
    kernels = [
        {
            "name": name,
            "what": what,
            "seconds": seconds / STEPS,
            "share": seconds / profile.seconds,
            "calls": calls / STEPS,
        }
        for name, what, seconds, calls in profile.kernels
    ]
    return {
        "step_seconds": profile.step_seconds / STEPS,
        "kernel_seconds": profile.seconds / STEPS,
        "elsewhere_seconds": profile.elsewhere / STEPS,
        "kernels": kernels,
    }


def as_table(profile: Profile) -> Group:
    """Returns a table of the dearest kernels, and remarks on the time without a kernel."""
    whole = profile.seconds
    if not whole:
        return Group("the trace has no event of an operation of the step")
    rows = [
        (name, what, f"{1e3 * s / STEPS:.2f}", f"{s / whole:.1%}", f"{calls / STEPS:g}")
        for name, what, s, calls in profile.kernels[:SHOWN]
    ]
    wall = profile.step_seconds * profile.devices
    lines = [f"attributed to operations of the step: {1 - profile.elsewhere / whole:.1%}"]
    if profile.on_cpu:
        lines.append(
            "on CPU the time is of threads, which run side by side and may wait for each "
            f"other: {whole / wall:.1f} of them at a time"
        )
    else:
        busy = f"the devices are busy for {whole / wall:.1%} of {1e3 * wall / STEPS:.1f} ms a step"
        lines.append(busy)
    title = f"the {SHOWN} dearest kernels, of one step"
    return Group(harness.make_table(title, HEADS, rows), *lines)

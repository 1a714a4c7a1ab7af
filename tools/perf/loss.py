"""The contrastive losses in blocks beside their plain form: memory, time, numbers, growth.

python -m tools.perf.loss [--memory-batch 32768] [--time-batch 4096]     on one device
python -m tools.perf.loss --devices 8 64 256 --dim 512                   as devices are added
python -m tools.perf.loss --topology v5e:2x4 v5e:8x8 v5e:16x16 --per-device 4096

The plain form has all logits of the batch in memory, several times; the blocked form has
`--block-size` rows of them at a time and computes them again on the way back (see
`objectives/blocked`). Memory is the temporary memory that the compiler sets aside for loss and
gradients, without embeddings and gradients themselves; nothing is run for it.

On one device also the time of loss and gradients at `--time-batch`, the forms in turns, and the
largest difference between the forms, relative to the largest number of its array. The exit status
is 1 if a figure is beyond `--least-memory-ratio`, `--most-time-ratio` or `--most-difference`.

With several numbers of devices the batch of a device, `--per-device`, is held fixed. A TPU need not
be there, but libtpu must; its memory is the main memory (HBM) alone: what fits beside the cores
(VMEM, 128 MiB) does not count, so that the batch of a device has to be large. The exit status is 1
if the blocked form needs over 10 % more than on the fewest devices, or if the plain form does not
(then the comparison shows nothing).
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from tools.perf import harness
from tools.perf.harness import MIB
from vlp_jax.arguments import parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES, pair_logits
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.parallel.topologies import tpu_devices

Loss = Callable[..., tuple[jax.Array, jax.Array]]
ALLOWED_GROWTH = 1.1
# Loss and gradients by embeddings of images and of texts, scale and bias of the logits.
ARGUMENTS = (0, 1, 2, 3)


class Line(NamedTuple):
    """A loss in one form: temporary bytes per device, for each number of devices.

    They are infinite where the compiler refused because they would not fit.
    """

    loss: str
    form: str
    temporary: tuple[float, ...]

    def ratios(self) -> list[float]:
        """Returns each over the bytes on the fewest devices.

        The latter are 0 on a TPU if all of it fits beside the cores.
        """
        first = self.temporary[0]

        def ratio(each: float) -> float:
            if each == first:
                return 1.0
            return each / first if first else math.inf

        return [ratio(each) for each in self.temporary]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the arguments."""
    parser = harness.make_parser("loss", __doc__, rounds=7)
    add = parser.add_argument
    add("--dim", type=int, default=768, help="width of the embeddings (default: %(default)s)")
    add("--block-size", type=int, default=256, help="of the blocked form (default: %(default)s)")
    add("--memory-batch", type=int, default=32_768, help="compiled for memory, on one device")
    add("--time-batch", type=int, default=4096, help="run for time and numbers, on one device")
    add("--least-memory-ratio", type=float, default=30.0, help="plain / blocked")
    add("--most-time-ratio", type=float, default=1.1, help="blocked / plain")
    add("--most-difference", type=float, default=1e-5, help="of the numbers")
    add("--devices", type=int, nargs="+", help="rising numbers of CPU devices, such as 8 64 256")
    add("--topology", nargs="+", metavar="NAME", help="rising TPUs, such as v5e:2x4 v5e:8x8")
    add("--per-device", type=int, default=128, help="pairs on each of several devices")
    counts = ("memory_batch", "time_batch", "dim", "block_size", "rounds", "per_device")
    return parse_with_overrides(parser, argv, *counts)[0]


def plain_loss(name: str, *arguments: Any) -> tuple[jax.Array, jax.Array]:
    """Returns the results of `blocked_loss`, by way of all logits at once."""
    logits = pair_logits(*arguments)
    hits = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
    return PAIRWISE_LOSSES[name](logits), hits.sum().astype(jnp.float32)


def forms_of(name: str, mesh: Mesh, block_size: int) -> dict[str, Loss]:
    """Returns both forms of a loss on `mesh`."""
    return {
        "plain": functools.partial(plain_loss, name),
        "blocked": functools.partial(blocked_loss, name, mesh=mesh, block_size=block_size),
    }


def temporary_bytes(loss: Loss, mesh: Mesh, batch: int, dim: int) -> float:
    """Returns temporary bytes per device of the compiled loss with its gradients; see `Line`."""
    spread, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    embedding = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=spread)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(
        jax.value_and_grad(loss, argnums=ARGUMENTS, has_aux=True),
        # Gradients stay where their embeddings are: gathering them would count as memory of the
        # loss.
        out_shardings=((whole, whole), (spread, spread, whole, whole)),
    )
    with rules.use_mesh(mesh):
        lowered = step.lower(embedding, embedding, scalar, scalar)
    try:
        return lowered.compile().memory_analysis().temp_size_in_bytes
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            return math.inf
        raise


def measure(arguments: argparse.Namespace, name: str) -> dict[str, float]:
    """Returns the figures of one loss on one device."""
    mesh = mesh_lib.make_mesh({"replica": 1}, jax.local_devices()[:1])
    forms = forms_of(name, mesh, arguments.block_size)
    plain, blocked = (
        temporary_bytes(loss, mesh, arguments.memory_batch, arguments.dim)
        for loss in forms.values()
    )
    with rules.use_mesh(mesh):
        times, results = run_in_turns(forms, arguments)
    ratio = harness.ratio(times["blocked"], times["plain"])
    return {
        "plain_bytes": plain,
        "blocked_bytes": blocked,
        "memory_ratio": plain / blocked,
        **{f"{form}_seconds": statistics.median(each) for form, each in times.items()},
        "time_ratio": ratio.median,
        "time_ratio_min": min(ratio.rounds),
        "time_ratio_max": max(ratio.rounds),
        "difference": difference(results["plain"], results["blocked"]),
    }


def run_in_turns(
    forms: dict[str, Loss], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Returns the seconds of each round, and loss and gradients, of each form."""
    keys = jax.random.split(jax.random.key(0))
    shape = (arguments.time_batch, arguments.dim)
    image, text = (jax.random.normal(key, shape) for key in keys)
    image, text = (x / jnp.linalg.norm(x, axis=1, keepdims=True) for x in (image, text))
    # Scale and bias that SigLIP starts with: the sigmoid is then not all flat.
    inputs = jax.block_until_ready((image, text, jnp.float32(10.0), jnp.float32(-10.0)))
    steps = {
        form: jax.jit(jax.value_and_grad(loss, argnums=ARGUMENTS, has_aux=True))
        for form, loss in forms.items()
    }
    results = {form: jax.block_until_ready(step(*inputs)) for form, step in steps.items()}

    def timed(step: Loss) -> float:
        return harness.seconds(lambda: jax.block_until_ready(step(*inputs)))

    turns = {form: functools.partial(timed, step) for form, step in steps.items()}
    return harness.in_turns(turns, arguments.rounds), results


def difference(one: Any, other: Any) -> float:
    """Returns the largest difference of loss and gradients, relative to its array's largest number.

    The gradients of scale and bias count as one array: the softmax's loss has no slope along the
    bias, and its computed gradient is nothing but rounding.
    """

    def arrays(result: Any) -> list[jax.Array]:
        (loss, hits), (image, text, scale, bias) = result
        return [loss, hits, image, text, jnp.stack([scale, bias])]

    differences = [
        jnp.where((a == b).all(), 0, jnp.abs(a - b).max() / jnp.abs(a).max())
        for a, b in zip(arrays(one), arrays(other), strict=True)
    ]
    return float(np.max(differences))  # NaN if one of them is


def faults(name: str, found: dict[str, float], arguments: argparse.Namespace) -> list[str]:
    """Returns a line for each figure that is beyond its limit."""
    lines = []
    if found["memory_ratio"] < arguments.least_memory_ratio:
        lines.append(f"{name}: the plain form needs only {found['memory_ratio']:.1f} x the memory")
    if found["time_ratio"] > arguments.most_time_ratio:
        lines.append(f"{name}: the blocked form takes {found['time_ratio']:.2f} x the time")
    if not found["difference"] <= arguments.most_difference:
        lines.append(f"{name}: the forms differ by {found['difference']:.1e}")
    return lines


def make_meshes(arguments: argparse.Namespace) -> list[Mesh]:
    """Makes the meshes to compare, their sizes rising.

    Raises:
      UserError: fewer than two, or their sizes do not rise.
    """
    if arguments.topology:
        parts = [tpu_devices(name) for name in arguments.topology]
        sizes, option = [len(part) for part in parts], "--topology"
    else:
        sizes, option = arguments.devices, "--devices"
    if len(sizes) < 2 or sizes[0] < 1 or sorted(set(sizes)) != sizes:
        raise UserError(f"{option}: at least two rising numbers of devices, not {sizes}")
    if not arguments.topology:
        jax.config.update("jax_num_cpu_devices", sizes[-1])
        parts = [jax.devices("cpu")[:size] for size in sizes]
    return [mesh_lib.make_mesh({"replica": len(part)}, part) for part in parts]


def measure_growth(arguments: argparse.Namespace, meshes: Sequence[Mesh]) -> list[Line]:
    """Returns a line for each loss in each form."""
    found: dict[tuple[str, str], list[float]] = {}
    for mesh in meshes:
        for name in PAIRWISE_LOSSES:
            for form, loss in forms_of(name, mesh, arguments.block_size).items():
                batch = mesh.size * arguments.per_device
                each = temporary_bytes(loss, mesh, batch, arguments.dim)
                found.setdefault((name, form), []).append(each)
    return [Line(name, form, tuple(each)) for (name, form), each in found.items()]


def growth_faults(lines: Sequence[Line]) -> list[str]:
    """Returns a line for each promise of the blocked form that does not hold."""
    found = []
    for line in lines:
        growth = max(line.ratios()[1:])
        if line.form == "blocked" and growth > ALLOWED_GROWTH:
            found.append(f"{line.loss}: the blocked form grows with the devices, to {growth:.2f} x")
        if line.form == "plain" and growth <= ALLOWED_GROWTH:
            found.append(f"{line.loss}: the plain form does not grow with the devices")
    return found


def growth_table(lines: Sequence[Line], devices: Sequence[int]) -> str:
    """Returns a row for each line: MiB per device, and the ratio to the fewest devices."""
    rows = []
    for line in lines:
        cells = (
            f"{temporary / MIB:,.2f} MiB ({ratio:.2f} x)"
            if math.isfinite(temporary)
            else "does not fit"
            for temporary, ratio in zip(line.temporary, line.ratios(), strict=True)
        )
        rows.append([line.loss, line.form, *cells])
    return harness.markdown(["loss", "form", *(f"{n} devices" for n in devices)], rows, left=2)


def compare_growth(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Prints the table of several numbers of devices; returns figures and faults."""
    meshes = make_meshes(arguments)
    target = "TPU " + ", ".join(arguments.topology) if arguments.topology else "CPU"
    print(
        f"temporary memory of a device for loss and gradients, compiled for {target}: "
        f"{arguments.per_device} pairs a device, {arguments.dim} wide\n"
    )
    lines = measure_growth(arguments, meshes)
    print(growth_table(lines, [mesh.size for mesh in meshes]))
    return {"lines": [line._asdict() for line in lines]}, growth_faults(lines)


def compare_forms(arguments: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Prints a table of both forms on one device; returns figures and faults."""
    print(f"{jax.devices()[0].device_kind}, {arguments.dim} wide, float32")
    figures, found = {}, []
    for name in PAIRWISE_LOSSES:
        figures[name] = one = measure(arguments, name)
        found += faults(name, one, arguments)
        print(
            f"{name:8}  batch {arguments.memory_batch:,}: plain {one['plain_bytes'] / MIB:,.0f} "
            f"MiB, blocked {one['blocked_bytes'] / MIB:,.0f} MiB, 1/{one['memory_ratio']:.1f}\n"
            f"{'':8}  batch {arguments.time_batch:,}: time x {one['time_ratio']:.3f} "
            f"({one['time_ratio_min']:.3f} to {one['time_ratio_max']:.3f}), largest "
            f"difference {one['difference']:.1e}"
        )
    return figures, found


def command(argv: list[str]) -> int:
    """Measures, prints and writes; returns 1 if a figure is beyond its limit."""
    arguments = parse(argv)
    if arguments.devices or arguments.topology:
        harness.compile_on_cpu()
        figures, found = compare_growth(arguments)
    else:
        # A program from the cache may come without its figures.
        jax.config.update("jax_enable_compilation_cache", False)
        figures, found = compare_forms(arguments)
    harness.write_json(arguments.json, "loss", argv, figures)
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())

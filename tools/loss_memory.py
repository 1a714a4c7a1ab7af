"""Memory of the contrastive losses as devices are added, from compiled programs; nothing is run.

python -m tools.loss_memory
python -m tools.loss_memory --topology v5e:2x4 v5e:8x8 v5e:16x16 --per-device 4096

The batch of a device is held fixed. A line gives the temporary memory that the compiler sets aside
on each device for the loss and its gradients, without the embeddings and the gradients themselves.
For a TPU, which need not be there but libtpu must, it is the main memory (HBM) alone: what fits
beside the cores (VMEM, 128 MiB) does not count, so that the batch of a device has to be large.

The exit status is 1 if the blocked form needs over 10 % more than on the fewest devices, or if the
plain form does not (then the comparison shows nothing).
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vlp_jax.errors import UserError
from vlp_jax.objectives.blocked import blocked_loss
from vlp_jax.objectives.pairwise import PAIRWISE_LOSSES, pair_logits
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.parallel.topologies import tpu_devices
from vlp_jax.training.command import run_command

FORMS = ("plain", "blocked")
ALLOWED_GROWTH = 1.1
MIB = 2**20


class Line(NamedTuple):
    """A loss in one form: temporary bytes per device, for each number of devices.

    They are infinite where the compiler refused because they would not fit.
    """

    loss: str
    form: str
    temporary: tuple[float, ...]

    def ratios(self) -> list[float]:
        """Of each to that on the fewest devices (0 on a TPU if all of it fits beside the cores)."""
        first = self.temporary[0]

        def ratio(each: float) -> float:
            if each == first:
                return 1.0
            return each / first if first else math.inf

        return [ratio(each) for each in self.temporary]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.loss_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--devices",
        type=int,
        nargs="+",
        default=[8, 64, 256],
        help="numbers of CPU devices, rising (default: 8 64 256)",
    )
    parser.add_argument("--per-device", type=int, default=128, help="pairs on a device")
    parser.add_argument("--dim", type=int, default=512, help="width of the embeddings")
    parser.add_argument("--block-size", type=int, default=256, help="of the blocked form")
    parser.add_argument(
        "--topology",
        nargs="+",
        metavar="NAME",
        help="compile for all devices of each of these TPUs instead: v5e:2x4 v5e:8x8 v5e:16x16",
    )
    parser.add_argument("--markdown", action="store_true", help="print a table for the docs")
    return parser.parse_args(argv)


def make_meshes(arguments: argparse.Namespace) -> list[Mesh]:
    """The meshes to compare, their sizes rising.

    Raises:
      UserError: fewer than two, or their sizes do not rise.
    """
    if arguments.topology:
        parts = [tpu_devices(name) for name in arguments.topology]
        sizes, what = [len(part) for part in parts], "--topology"
    else:
        sizes, what = arguments.devices, "--devices"
    if len(sizes) < 2 or sizes[0] < 1 or sorted(set(sizes)) != sizes:
        raise UserError(f"{what}: at least two rising numbers of devices, not {sizes}")
    if not arguments.topology:
        jax.config.update("jax_num_cpu_devices", sizes[-1])
        parts = [jax.devices("cpu")[:size] for size in sizes]
    return [mesh_lib.make_mesh({"replica": len(part)}, part) for part in parts]


def plain_loss(name: str, *arguments: Any) -> tuple[jax.Array, jax.Array]:
    """What `blocked_loss` gives, by way of all logits at once."""
    logits = pair_logits(*arguments)
    hits = jnp.argmax(logits, axis=1) == jnp.arange(logits.shape[0])
    return PAIRWISE_LOSSES[name](logits), hits.sum().astype(jnp.float32)


def temporary_bytes(
    loss: Callable[..., tuple[jax.Array, jax.Array]], mesh: Mesh, batch: int, dim: int
) -> float:
    """Per device, of the compiled loss with the gradients of its four arguments; see `Line`."""
    spread, whole = mesh_lib.batch_sharding(mesh), mesh_lib.replicated(mesh)
    embedding = jax.ShapeDtypeStruct((batch, dim), jnp.float32, sharding=spread)
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=whole)
    step = jax.jit(
        jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True),
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


def measure(arguments: argparse.Namespace, meshes: Sequence[Mesh]) -> list[Line]:
    """A line for each loss in each form."""

    def on(mesh: Mesh, name: str, form: str) -> float:
        if form == "plain":
            loss = functools.partial(plain_loss, name)
        else:
            loss = functools.partial(blocked_loss, name, mesh=mesh, block_size=arguments.block_size)
        return temporary_bytes(loss, mesh, mesh.size * arguments.per_device, arguments.dim)

    return [
        Line(name, form, tuple(on(mesh, name, form) for mesh in meshes))
        for name in PAIRWISE_LOSSES
        for form in FORMS
    ]


def faults(lines: Sequence[Line]) -> list[str]:
    """What is not as the blocked form promises, in words."""
    found = []
    for line in lines:
        growth = max(line.ratios()[1:])
        if line.form == "blocked" and growth > ALLOWED_GROWTH:
            found.append(f"{line.loss}: the blocked form grows with the devices, to {growth:.2f} x")
        if line.form == "plain" and growth <= ALLOWED_GROWTH:
            found.append(f"{line.loss}: the plain form does not grow with the devices")
    return found


def table(lines: Sequence[Line], devices: Sequence[int], markdown: bool) -> str:
    """A row for each line: MiB per device, and the ratio to that on the fewest devices."""
    rows = [["loss", "form", *(f"{n} devices" for n in devices)]]
    for line in lines:
        cells = (
            f"{temporary / MIB:.2f} MiB ({ratio:.2f} x)"
            if math.isfinite(temporary)
            else "does not fit"
            for temporary, ratio in zip(line.temporary, line.ratios(), strict=True)
        )
        rows.append([line.loss, line.form, *cells])
    if markdown:
        rows.insert(1, ["---", "---", *["---:"] * len(devices)])
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    found: list[str] = []

    def command() -> None:
        for name in ("per_device", "dim", "block_size"):
            if getattr(arguments, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} is at least 1")
        jax.config.update("jax_platforms", "cpu")
        # A program from the cache may come without its figures.
        jax.config.update("jax_enable_compilation_cache", False)
        meshes = make_meshes(arguments)
        target = "TPU " + ", ".join(arguments.topology) if arguments.topology else "CPU"
        print(
            f"temporary memory of a device for loss and gradients, compiled for {target}: "
            f"{arguments.per_device} pairs a device, {arguments.dim} wide\n"
        )
        lines = measure(arguments, meshes)
        print(table(lines, [mesh.size for mesh in meshes], arguments.markdown))
        found.extend(faults(lines))
        for fault in found:
            print(f"error: {fault}", file=sys.stderr)

    return run_command(command) or int(bool(found))


if __name__ == "__main__":
    sys.exit(main())

"""The memory of the contrastive losses, plain and in blocks, as devices are added.

python -m tools.perf.loss --devices 8 64 256 --dim 512
python -m tools.perf.loss --topology v5e:2x4 v5e:8x8 v5e:16x16 --per-device 4096

The plain form has all logits of the batch in memory, several times; the blocked form has
`--block-size` rows of them at a time and computes them again on the way back (see
`objectives/blocked`). Memory is the temporary memory that the compiler sets aside for loss and
gradients, without embeddings and gradients themselves; nothing is run for it.

The batch of a device, `--per-device`, is held fixed. A TPU need not be there, but libtpu must; its
memory is the main memory (HBM) alone: what fits beside the cores (VMEM, 128 MiB) does not count, so
that the batch of a device has to be large. The exit status is 1 if the blocked form needs over 10 %
more than on the fewest devices, or if the plain form does not (then the comparison shows nothing).
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
    parser = harness.make_parser("loss", __doc__)
    add, told = parser.add_argument, "default: %(default)s"
    add("--dim", type=int, default=768, help=f"width of the embeddings ({told})")
    add("--block-size", type=int, default=256, help=f"of the blocked form ({told})")
    sizes = "rising numbers of CPU devices"
    add("--devices", type=int, nargs="+", default=[8, 64, 256], help=f"{sizes} ({told})")
    add("--topology", nargs="+", metavar="NAME", help="rising TPUs, such as v5e:2x4 v5e:8x8")
    add("--per-device", type=int, default=128, help=f"pairs on each device ({told})")
    return parse_with_overrides(parser, argv, "dim", "block_size", "per_device")[0]


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


def command(argv: list[str]) -> int:
    """Compiles, prints and writes; returns 1 if a promise of the blocked form does not hold."""
    arguments = parse(argv)
    harness.compile_on_cpu()
    meshes = make_meshes(arguments)
    target = "TPU " + ", ".join(arguments.topology) if arguments.topology else "CPU"
    print(
        f"temporary memory of a device for loss and gradients, compiled for {target}: "
        f"{arguments.per_device} pairs a device, {arguments.dim} wide\n"
    )
    lines = measure_growth(arguments, meshes)
    print(growth_table(lines, [mesh.size for mesh in meshes]))
    harness.write_json(arguments.json, "loss", argv, {"lines": [x._asdict() for x in lines]})
    found = growth_faults(lines)
    for fault in found:
        print(f"error: {fault}", file=sys.stderr)
    return int(bool(found))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())

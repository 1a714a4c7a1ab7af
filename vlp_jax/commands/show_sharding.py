"""Shows how the state of a config lies on a mesh: a line per parameter, then the totals.

    vlp-jax show-sharding --config configs/clip_l14.py --devices 64
    vlp-jax show-sharding --config configs/siglip_g.py --topology v5e:16x16 --slices 2 \\
        --config.mesh.preset=hybrid

Needs no data, no tokenizer and no accelerator, and allocates nothing. A line has the path of a
parameter, its dimensions as name=size/axes of the mesh, and its bytes on a device. A ratio is the
bytes of a device over an even part, the state divided by the devices along fsdp and tensor. 1.00 is
ideal; warnings name the parameters that keep it above.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax.arguments import load_config, make_parser, parse_with_overrides
from vlp_jax.commands.plan import with_source_model
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.parallel.topologies import tpu_devices
from vlp_jax.training.abstract_setup import abstract_setup
from vlp_jax.training.command import run_command
from vlp_jax.training.setup import Setup

ANY_EPOCH = 1_000_000  # examples of an epoch: how long a run is changes nothing here


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter and its sharding.

    Attributes:
      names: the logical name of each dimension; None for an unnamed dimension.
      spec: the mesh axes of each dimension; () for a dimension that is not sharded.
      bytes_per_device: bytes of a shard.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    spec: tuple[tuple[str, ...], ...]
    bytes_per_device: int

    @property
    def is_whole(self) -> bool:
        """Whether every device holds the whole parameter."""
        return not any(self.spec)


@dataclasses.dataclass(frozen=True)
class Report:
    """Everything that the command shows.

    Attributes:
      mesh: devices along each axis.
      state: parameters, the optimizer's state, and the average if there is one.
      whole: paths of the parameters that lie whole on every device although the mesh shards.
    """

    config: str
    mesh: dict[str, int]
    rows: list[Row]
    params: rules.Spread
    state: rules.Spread
    whole: list[str]
    warnings: list[str]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Returns the arguments, and the config with its overrides.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    parser = make_parser("vlp-jax show-sharding", __doc__, config=True)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--devices", type=int, default=8, metavar="N", help="CPUs (default: 8)")
    where.add_argument("--topology", metavar="NAME", help="a TPU slice instead: v5e:16x16")
    parser.add_argument("--slices", type=int, default=1, metavar="N", help="of the topology")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all of it there too")
    arguments, overrides = parse_with_overrides(parser, argv, "devices")
    if arguments.slices != 1 and not arguments.topology:
        raise UserError("--slices needs --topology: CPU devices have no slices")
    return arguments, load_config(arguments.config, overrides)


def find_devices(arguments: argparse.Namespace) -> list[Any]:
    """Returns the devices of the mesh, none of which has to be here."""
    jax.config.update("jax_platforms", "cpu")
    if arguments.topology:
        return tpu_devices(arguments.topology, arguments.slices)
    jax.config.update("jax_num_cpu_devices", arguments.devices)
    return jax.devices()[: arguments.devices]


def make_report(name: str, setup: Setup) -> Report:
    """Reports how the state of `setup` lies on its mesh."""
    # Boxes keep the logical names of dimensions, which the state itself has lost.
    boxed = jax.eval_shape(lambda: setup.objective.init(jax.random.key(0), setup.batch_spec))
    rows = rows_of(setup.abstract.params, boxed)
    return Report(
        config=name,
        mesh=dict(setup.mesh.shape),
        rows=rows,
        params=rules.spread(setup.abstract.params, setup.mesh),
        state=rules.spread(setup.abstract, setup.mesh),
        whole=[row.path for row in whole(rows, setup.mesh)],
        warnings=warnings(rows, setup.mesh),
    )


def rows_of(params: Any, boxed: Any) -> list[Row]:
    """Makes a row for each parameter, in the order of the tree.

    Args:
      params: abstract parameters with shardings.
      boxed: the same tree with logical names, as `Objective.init` returns it.
    """
    result = []
    with_names = jax.tree.leaves(boxed, is_leaf=rules.is_boxed)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), box in zip(leaves, with_names, strict=True):
        assert nn.unbox(box).shape == leaf.shape, (path, box, leaf)
        # A PartitionSpec may leave out the last dimensions.
        spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        result.append(
            Row(
                path=jax.tree_util.keystr(path, simple=True, separator="/"),
                shape=tuple(leaf.shape),
                names=rules.names_of(box),
                spec=tuple(
                    axes if isinstance(axes, tuple) else () if axes is None else (axes,)
                    for axes in spec
                ),
                bytes_per_device=rules.shard_bytes(leaf),
            )
        )
    return result


def table(found: Sequence[Row]) -> str:
    """Formats a line for each row: path, each dimension as `name=size/axes`, bytes on a device."""
    cells = [(row.path, _dimensions(row), f"{row.bytes_per_device:,}") for row in found]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        f"{path.ljust(widths[0])}  {dims.ljust(widths[1])}  {size.rjust(widths[2])}"
        for path, dims, size in cells
    )


def _dimensions(row: Row) -> str:
    parts = [
        f"{name or '.'}={size}" + (f"/{'+'.join(axes)}" if axes else "")
        for name, size, axes in zip(row.names, row.shape, row.spec, strict=True)
    ]
    return " ".join(parts) or "scalar"


def warnings(found: Sequence[Row], mesh: Mesh) -> list[str]:
    """Returns a line for each kind of parameter that the mesh shards less than one would expect."""
    lines = []
    tensor = mesh.shape["tensor"]
    tensor_names = {name for name, axes in rules.AXIS_RULES if axes == "tensor"}
    stuck: dict[tuple[str, int], int] = {}  # dimensions that `tensor` does not divide -> count
    for row in found:
        for name, size, axes in zip(row.names, row.shape, row.spec, strict=True):
            if tensor > 1 and "tensor" not in axes and name in tensor_names:
                stuck[name, size] = stuck.get((name, size), 0) + 1
    for (name, size), count in sorted(stuck.items()):
        lines.append(
            f"tensor {tensor} does not divide {size} {name}: {count} parameters lie whole along "
            "them, and every device of the tensor axis does the same work there"
        )
    left = whole(found, mesh)
    if left:
        size = sum(row.bytes_per_device for row in left)
        lines.append(f"parameters that lie whole on every device: {len(left)}, of {size:,} bytes")
    return lines


def whole(found: Sequence[Row], mesh: Mesh) -> list[Row]:
    """Selects the parameters that every device holds whole, although the mesh shards."""
    if all(mesh.shape[axis] == 1 for axis in rules.SHARDING_AXES):
        return []
    return [row for row in found if row.is_whole]


def fitting_batch(config: ConfigDict, devices: int) -> ConfigDict:
    """Returns the config with a batch that every mesh of the devices divides: it is not shown."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.batch_size = devices * config.microbatches
    return config


def text(report: Report) -> str:
    """Returns the report as it is printed."""
    axes = " x ".join(f"{axis} {size}" for axis, size in report.mesh.items())
    lines = [table(report.rows), "", f"{report.config} on {axes}"]
    for what, spread in (("parameters", report.params), ("whole state", report.state)):
        lines.append(
            f"{what}: {spread.total:,} bytes, {spread.per_device:,} on a device, "
            f"{spread.ratio:.3f} of an even part"
        )
    count = sum(math.prod(row.shape) for row in report.rows)
    lines.append(f"{count:,} parameters in {len(report.rows)} arrays")
    lines += [f"warning: {line}" for line in report.warnings]
    return "\n".join([*lines, *(f"  {path}" for path in report.whole)])


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""

    def command() -> None:
        arguments, config = parse(sys.argv[1:] if argv is None else argv)
        # Before anything asks JAX for a device: their number is fixed by then.
        devices = find_devices(arguments)
        config = with_source_model(config)
        mesh = mesh_lib.make_mesh(config.mesh, devices)
        setup = abstract_setup(fitting_batch(config, len(devices)), mesh, ANY_EPOCH)
        report = make_report(arguments.config, setup)
        print(text(report))
        if arguments.json:
            try:
                arguments.json.write_text(json.dumps(dataclasses.asdict(report), indent=2) + "\n")
            except OSError as error:
                raise UserError(f"--json {arguments.json}: {error.strerror}") from error

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())

"""Rewrites checkpoints of an older version, in which each layer stands by itself.

    python -m tools.stack_layers runs/old --output runs/stacked

Runs with scan_layers=False once kept "image/encoder/layer_3/..."; today all layers of a tower are
in one array, "image/encoder/layers/...", however they are computed. Nothing is rounded, and the
new run goes on where the old one stopped, with the state of its optimizer. The old workdir is left
as it is. The whole state of one checkpoint has to fit into the memory of this machine.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence

import flax.traverse_util
import numpy as np
from etils import epath

from vlp_jax.arguments import make_parser
from vlp_jax.errors import UserError
from vlp_jax.training import checkpoint
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.command import run_command
from vlp_jax.training.restore import LAYER, metadata, read_on_host, shapes_of

# Some optimizers keep the state of stacked layers apart, in a group for each depth, with a count of
# steps for each layer (`param_groups.layer_by_layer`). Single layers were in the group "single".
SINGLE = re.compile(r"(.*/inner_states/)single(/inner_state/.*)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser("python -m tools.stack_layers", __doc__)
    parser.add_argument("workdir", metavar="WORKDIR", help="a run with such checkpoints")
    told = "the new workdir; it must not exist"
    parser.add_argument("--output", metavar="DIR", required=True, help=told)
    return parser.parse_args(argv)


def convert(workdir: epath.Path, output: epath.Path) -> None:
    """Copies a workdir, with the layers of its checkpoints stacked.

    Raises:
      UserError: there is no checkpoint, its layers are stacked already, or `output` exists.
    """
    if output.exists():
        raise UserError(f"--output: {output} exists; give a folder that does not")
    newest = checkpoint.choose_step(workdir, None)
    steps = checkpoint.saved_steps(workdir)
    folders = {step: workdir / "checkpoints" / str(step) for step in steps}
    # All checkpoints are looked at before anything is written.
    origins = {
        step: find_origins([*shapes_of(metadata(folder / "state"))], folder)
        for step, folder in folders.items()
    }
    output.mkdir(parents=True)
    with Checkpointer(output, keep_last=len(steps), asynchronous=False) as new:
        for step, folder in folders.items():
            with Checkpointer(workdir, read_only=True) as old:
                record = old.input_state(step)
            state = folder / "state"
            state = stack(read_on_host(state, metadata(state)), origins[step])
            new.save(step, flax.traverse_util.unflatten_dict(state, sep="/"), record)
            new.finish(step)
            size = sum(array.nbytes for array in state.values())
            print(f"step {step:,}: {len(state):,} arrays, {size / 2**20:,.0f} MiB")
    for entry in workdir.iterdir():
        if entry.name != "checkpoints":
            copy(entry, output / entry.name)
    print(f"wrote {output}, whose newest checkpoint is of step {newest:,}")


def find_origins(paths: Sequence[str], folder: object) -> dict[str, str | list[str]]:
    """Path of each array with the layers stacked -> the path it has now, or the paths of its rows.

    Args:
      paths: of all arrays of a state in which each layer stands by itself.
      folder: the checkpoint, for an error.

    Raises:
      UserError: no layer stands by itself, or layers of a tower differ in what they have.
    """
    found: dict[str, str | list[str]] = {}
    layers: dict[str, dict[int, str]] = {}
    for path in paths:
        match = LAYER.fullmatch(path)
        if match is None:
            found[path] = path
        else:
            layers.setdefault(f"{match[1]}layers/{match[3]}", {})[int(match[2])] = path
    if not layers:
        raise UserError(f"the layers of {folder} are stacked already; it can be used as it is")
    groups: set[tuple[str, int]] = set()
    for path, rows in layers.items():
        depth = len(rows)
        if sorted(rows) != list(range(depth)):
            raise UserError(
                f"{folder}: {path} is of the layers {sorted(rows)} alone, which cannot be stacked: "
                "layers that were frozen one by one have no state of the optimizer"
            )
        single = SINGLE.fullmatch(path)
        if single:
            groups.add((single[1], depth))
            path = f"{single[1]}stack_of_{depth}{single[2]}"
        found[path] = [rows[index] for index in range(depth)]
    for above, depth in groups:
        for path in paths:
            end = path.removeprefix(f"{above}single/")
            if end != path and end.endswith("/count"):
                # A group of single layers has one count of steps; a stack has a count for each
                # layer.
                found[f"{above}stack_of_{depth}/{end}"] = [path] * depth
    return found


def stack(
    arrays: Mapping[str, np.ndarray], origins: Mapping[str, str | list[str]]
) -> dict[str, np.ndarray]:
    """The arrays of a state with the layers stacked, where `find_origins` has found them."""
    return {
        path: arrays[source] if isinstance(source, str) else np.stack([arrays[x] for x in source])
        for path, source in origins.items()
    }


def copy(source: epath.Path, target: epath.Path) -> None:
    """Copies a file, or a folder with all that is in it."""
    if not source.is_dir():
        source.copy(target)
        return
    target.mkdir()
    for entry in source.iterdir():
        copy(entry, target / entry.name)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    arguments = parse(sys.argv[1:] if argv is None else argv)

    def command() -> None:
        convert(checkpoint.absolute(arguments.workdir), checkpoint.absolute(arguments.output))

    return run_command(command)


if __name__ == "__main__":
    sys.exit(main())

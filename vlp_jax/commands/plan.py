"""Memory, time and cost of a training run on devices that are not here, before it is paid for.

vlp-jax plan --config configs/siglip_b16.py --topology v5e:16x16
vlp-jax plan --config configs/clip_l14.py --topology v5p:4x4x4 --config.mesh.fsdp=64
vlp-jax plan --config configs/mae_h14.py --topology v6e:8x8 --epoch-examples 1281167
vlp-jax plan --config configs/siglip_b16.py --topology gpu:h100x64 --mfu 0.4 --json FILE

For a TPU the real step (optimizer, mesh, rematerialization, donation) is compiled by libtpu (pip
install -r requirements-plan.txt), which takes minutes; no TPU is needed, and no data. The report
has the bytes that a device holds, moves and sends in a step, its FLOPs, the least time they take,
and the time of the whole schedule. For cpu:N and gpu:KINDxN nothing is compiled: state, FLOPs and
the time of these are all that is known.

Evaluations, checkpoints and waiting for data are not part of a plan. Exit status: 0 it fits, or
that cannot be known; 1 it does not fit; 2 a mistake in the arguments or the config.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax
from ml_collections import ConfigDict
from rich.console import Console

from vlp_jax.arguments import load_config, make_parser, parse_with_overrides
from vlp_jax.errors import UserError
from vlp_jax.planning.plan import make_plan, make_setup_for
from vlp_jax.planning.report import Findings, as_json, as_table
from vlp_jax.planning.search import Options
from vlp_jax.planning.target import make_target
from vlp_jax.training.command import run_command
from vlp_jax.versions import versions

DOES_NOT_FIT = 1
PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu")


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, ConfigDict]:
    """Returns the arguments, and the config with its overrides.

    Raises:
      UserError: an argument, a config file or a key that does not exist.
    """
    parser = make_parser("vlp-jax plan", __doc__, config=True)
    add = parser.add_argument
    told = "v4, v5e, v5p, v6e or tpu7x and a shape (v5e:16x16), gpu:KINDxN or cpu:N"
    add("--topology", metavar="NAME", required=True, help=told)
    add("--slices", type=int, default=1, metavar="N", help="TPU slices of this topology")
    told = "examples of the training set, for durations in epochs (ImageNet: 1281167)"
    add("--epoch-examples", type=int, metavar="N", help=told)
    told = "find the cheapest rematerialization and the largest batch that fit, by compiling"
    add("--search", action="store_true", help=told)
    add("--mfu", type=float, metavar="R", help="also cost the run at this share of the peak")
    add("--price-per-chip-hour", type=float, metavar="X", help="also give the price of the run")
    add("--json", metavar="FILE", help="write all figures to FILE; - for stdout, in its place")
    arguments, overrides = parse_with_overrides(parser, argv)
    if arguments.mfu is not None and not 0 < arguments.mfu <= 1:
        raise UserError(f"--mfu is a share of the peak, above 0 and at most 1, not {arguments.mfu}")
    if arguments.price_per_chip_hour is not None and arguments.price_per_chip_hour < 0:
        raise UserError("--price-per-chip-hour is not negative")
    return arguments, load_config(arguments.config, overrides)


def with_source_model(config: ConfigDict) -> ConfigDict:
    """Returns the config with the model of its source, if `config.init_from.model` asks for it.

    It starts JAX's devices.

    Raises:
      UserError: see `source_model.completed`.
    """
    if not config.init_from.model:
        return config
    # Knows every foreign format: seconds that most configs need not wait for.
    from vlp_jax.encoders.source_model import completed

    config, notes = completed(config)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    return config


class Waiting:
    """Tells on stderr which long task runs, and how long it took."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)

    @contextlib.contextmanager
    def __call__(self, what: str) -> Iterator[None]:
        """Wraps one task that takes long."""
        begin = time.monotonic()
        # A spinner in a log file would be thousands of lines.
        if self._console.is_terminal:
            with self._console.status(what):
                yield
        else:
            self._console.print(f"{what} ...")
            yield
        self._console.print(f"{what}: {time.monotonic() - begin:.0f} s")


def find(arguments: argparse.Namespace, config: ConfigDict) -> Findings:
    """Makes the plan, and the search if it is wanted.

    Raises:
      UserError: the config does not fit the topology or itself.
    """
    waiting = Waiting()
    target = make_target(arguments.topology, arguments.slices)
    if arguments.search and not target.compiles:
        raise UserError(f"--search compiles, and there is no compiler here for {target.name}")
    setup = make_setup_for(with_source_model(config), target, arguments.epoch_examples)
    what = "compile the step" if target.compiles else "count"
    with waiting(f"{what} for {target.name}"):
        plan = make_plan(setup, target)
    searched = None
    if arguments.search:
        with contextlib.ExitStack() as stack:

            def announce(text: str) -> None:
                # Ends the line of the compilation before, whose end nobody tells.
                stack.close()
                stack.enter_context(waiting(f"compile with {text}"))

            options = Options(plan, arguments.epoch_examples, announce)
            policies = options.policies()
            searched = (policies, *options.largest(policies))
    return Findings(plan, arguments.price_per_chip_hour, arguments.mfu, searched)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    fits: list[bool | None] = []

    def command() -> None:
        arguments, config = parse(sys.argv[1:] if argv is None else argv)
        # The devices of the plan are not here, and those that are here stay free for others.
        jax.config.update("jax_platforms", "cpu")
        findings = find(arguments, config)
        fits.append(findings.plan.fits)
        text = json.dumps(as_json(findings, versions(PACKAGES)), indent=2) + "\n"
        # Nothing but JSON on stdout: it goes into another program.
        if arguments.json == "-":
            sys.stdout.write(text)
            return
        if arguments.json:
            Path(arguments.json).write_text(text)
        Console(width=100 if not sys.stdout.isatty() else None).print(as_table(findings))

    status = run_command(command)
    return status or (DOES_NOT_FIT if fits == [False] else 0)


if __name__ == "__main__":
    sys.exit(main())

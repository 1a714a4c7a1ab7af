"""Variants of the training step, ranked by what the TPU compiler says of them. No TPU is needed.

python -m tools.bench_compile --config configs/siglip_b16.py --topology v5e:2x2 --set remat \
    --batch-per-chip 64 128 256
python -m tools.bench_compile --config configs/siglip_b16.py --topology v5e:2x2 \
    --variant plain:objective.loss_form=plain --variant ring:objective.loss_form=blocked \
    --no-embedding-gathers ring
python -m tools.bench_compile --topology v5e:2x2 --set patch

Each variant is the real step of the config with a few keys replaced, compiled by libtpu
(pip install -r requirements-plan.txt). The figures are those of tools.plan: memory, bytes moved,
and the compiler's own estimate of its kernels in cycles, without the network. They rank variants;
they have never been compared with a TPU. A "+" says that Pallas kernels are in the cycles at their
roofline, the least that they can take. Ratios are per example, to the first variant at the first
batch size.

The sets patch, gather and length are small programs on one chip and need no config.

Exit status: 0; 1 if a variant of --no-embedding-gathers has one; 2 a mistake of the user.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import jax

from tools.plan import Waiting, versions
from vlp_jax import config as config_lib
from vlp_jax.arguments import check_arguments
from vlp_jax.errors import UserError
from vlp_jax.planning.micro_programs import MICRO_SETS, measure_micro
from vlp_jax.planning.target import Target, make_target
from vlp_jax.planning.variant_report import as_json, markdown, micro_markdown, one_line
from vlp_jax.planning.variant_sets import SETS
from vlp_jax.planning.variants import (
    Measured,
    Variant,
    make_setups,
    measure,
    parse_variant,
    with_depth,
)
from vlp_jax.training.command import run_command

HAS_A_GATHER = 1
MICRO_BATCH = 64


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments, and the overrides of the config."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench_compile",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", metavar="FILE[:ARG]", help="a config file, and its argument")
    add("--topology", metavar="NAME", help="v4, v5e, v5p, v6e or tpu7x and a shape (v5e:2x2)")
    add("--config.KEY", metavar="VALUE", help="replaces a key in all variants")
    add(
        "--variant",
        metavar="NAME:KEY=VALUE[,KEY=VALUE]",
        action="append",
        default=[],
        help="a variant; NAME alone is the config as it is",
    )
    add("--set", choices=(*SETS, *MICRO_SETS), help="a list of variants; see --list")
    add("--list", action="store_true", help="print the lists, and end")
    add("--base", metavar="NAME", help="what ratios refer to; default: the first variant")
    add("--batch-per-chip", type=int, nargs="+", default=[], metavar="N", help="examples a device")
    add("--depth", type=int, metavar="N", help="layers of each tower, in place of the config's")
    add("--epoch-examples", type=int, metavar="N", help="examples of the training set")
    add(
        "--no-embedding-gathers",
        metavar="NAME",
        nargs="+",
        default=[],
        help="fail if one of these variants gathers the embeddings of other devices",
    )
    add("--json", metavar="FILE", help="write all figures to FILE")
    add("--markdown", metavar="FILE", help="also append the table to FILE, with its command")
    overrides = [a.removeprefix("--config.") for a in argv if a.startswith("--config.")]
    return parser.parse_args([a for a in argv if not a.startswith("--config.")]), overrides


def list_sets() -> str:
    """The lists by name, with what each variant replaces."""
    lines = []
    for name, variants in SETS.items():
        lines.append(f"{name}:")
        lines += [f"  {one.name}: {', '.join(one.overrides) or 'the config'}" for one in variants]
    for name, make in MICRO_SETS.items():
        lines.append(f"{name} (small programs): {', '.join(one.name for one in make(1))}")
    return "\n".join(lines)


def chosen_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Those of the set, then those that are given; the base comes first.

    Raises:
      UserError: there are none, two have the same name, or an option names one that is not there.
    """
    found = [*SETS.get(arguments.set, ()), *(parse_variant(text) for text in arguments.variant)]
    names = [one.name for one in found]
    if not found:
        raise UserError("nothing to compile: give --variant or --set; --list tells the sets")
    if len(set(names)) < len(names):
        raise UserError(f"two variants have the same name: {', '.join(sorted(names))}")
    for name in (*([arguments.base] if arguments.base else []), *arguments.no_embedding_gathers):
        if name not in names:
            raise UserError(f"there is no variant {name!r} (there are: {', '.join(names)})")
    return sorted(found, key=lambda one: one.name != (arguments.base or names[0]))


def compile_all(
    arguments: argparse.Namespace, overrides: list[str], target: Target
) -> list[Measured]:
    """Each variant at each size of the batch.

    Raises:
      UserError: a mistake in the config or a variant; before anything is compiled.
    """
    if not arguments.config:
        raise UserError("--config is missing; only the small programs need none")
    variants = chosen_variants(arguments)
    config = config_lib.load(arguments.config)
    config_lib.override(config, overrides)
    config_lib.check(config)
    if arguments.depth is not None:
        config = with_depth(config, arguments.depth)
    sizes = arguments.batch_per_chip
    setups = make_setups(config, target, variants, sizes, arguments.epoch_examples)
    waiting, found = Waiting(), []
    for variant, size, setup in setups:
        with waiting(f"compile {variant.name} with {size:,} examples a chip"):
            found.append(measure(variant, size, setup, target))
        print(one_line(found[-1]), file=sys.stderr, flush=True)
        write_json(arguments.json, as_json(found, found[0]))  # what is known so far
    return found


def write_json(file: str | None, rows: list[dict[str, Any]]) -> None:
    """Writes all figures to `file`, if there is to be one."""
    if file:
        text = json.dumps({"versions": versions(), "variants": rows}, indent=2)
        Path(file).write_text(text + "\n")


def heading(arguments: argparse.Namespace, argv: Sequence[str], target: Target) -> str:
    """What was run, when and with which versions."""
    told = " ".join(f'"{a}"' if " " in a else a for a in _without_files(argv))
    found = ", ".join(f"{name} {version}" for name, version in versions().items())
    today = datetime.datetime.now(datetime.UTC).date()
    depth = f", {arguments.depth} layers a tower" if arguments.depth else ""
    return f"\n`python -m tools.bench_compile {told}`\n\n{today}, {target.name}{depth}; {found}\n\n"


def _without_files(argv: Sequence[str]) -> list[str]:
    """The arguments but for where results are written."""
    kept = []
    for index, argument in enumerate(argv):
        writes = argument in ("--json", "--markdown")
        if not writes and not (index and argv[index - 1] in ("--json", "--markdown")):
            kept.append(argument)
    return kept


def refused_gathers(names: Sequence[str], found: Sequence[Measured]) -> list[str]:
    """A line for each variant of `names` that gathers embeddings, or could not be looked at."""
    lines = []
    for one in found:
        if one.variant.name in names and (one.gathers or one.cycles is None):
            what = ", ".join(one.gathers) or "it was not compiled"
            lines.append(f"{one.variant.name} at {one.per_chip:,} a chip: {what}")
    return lines


def check_micro(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Raises UserError for options that a set of small programs does not take."""
    names = ("config", "variant", "base", "depth", "epoch_examples", "no_embedding_gathers")
    given = [f"--{name.replace('_', '-')}" for name in names if getattr(arguments, name)]
    if given or overrides:
        option = given[0] if given else f"--config.{overrides[0]}"
        raise UserError(f"{option} does nothing for the small programs of --set {arguments.set}")
    if len(arguments.batch_per_chip) > 1:
        raise UserError(f"--set {arguments.set} takes one --batch-per-chip")


def report(argv: Sequence[str]) -> int:
    """Compiles, prints and writes; returns the exit status.

    Raises:
      UserError: a mistake in the arguments or the config.
    """
    arguments, overrides = parse(argv)
    check_arguments(arguments)
    if any(size < 1 for size in arguments.batch_per_chip):
        raise UserError("--batch-per-chip is at least 1")
    if arguments.list:
        print(list_sets())
        return 0
    if not arguments.topology:
        raise UserError("--topology is missing; see --help")
    jax.config.update("jax_platforms", "cpu")
    target = make_target(arguments.topology)
    if not target.compiles:
        raise UserError(f"there is no compiler here for {target.name}: give a TPU topology")
    if arguments.set in MICRO_SETS:
        check_micro(arguments, overrides)
        batch = (arguments.batch_per_chip or [MICRO_BATCH])[0]
        micro = [measure_micro(one, target) for one in MICRO_SETS[arguments.set](batch)]
        table, refused = micro_markdown(micro), []
        write_json(arguments.json, [dataclasses.asdict(one) for one in micro])
    else:
        found = compile_all(arguments, overrides, target)
        table = markdown(found, found[0])
        refused = refused_gathers(arguments.no_embedding_gathers, found)
    print(table)
    for line in refused:
        print(f"embeddings are gathered: {line}", file=sys.stderr)
    if arguments.markdown:
        with Path(arguments.markdown).open("a") as file:
            file.write(heading(arguments, argv, target) + table + "\n")
    return HAS_A_GATHER if refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    statuses: list[int] = []

    def command() -> None:
        statuses.append(report(sys.argv[1:] if argv is None else argv))

    return run_command(command) or statuses[0]


if __name__ == "__main__":
    sys.exit(main())

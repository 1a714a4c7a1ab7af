"""Variants of the training step, ranked by the TPU compiler's own figures. No TPU is needed.

python -m tools.perf.compile_variants --config siglip_b16 --topology v5e:2x2 --set remat \
    --batch-per-chip 64 128 256
python -m tools.perf.compile_variants --config siglip_b16 --topology v5e:2x2 \
    --variant plain:objective.loss_form=plain --variant ring:objective.loss_form=blocked \
    --no-embedding-gathers ring

Each variant is the real step of the config with a few keys replaced, compiled by libtpu
(pip install -r requirements-plan.txt). The figures are those that `vlp-jax plan` gives: memory,
bytes moved, and the compiler's own estimate of its kernels in cycles, without the network. They
rank variants; they have never been compared with a TPU. A "+" says that Pallas kernels are in the
cycles at their roofline, the least that they can take. Ratios are per example, to the first variant
at the first batch size.

Exit status: 0; 1 if a variant of --no-embedding-gathers has one; 2 a mistake of the user.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import jax

from tools.perf import harness
from tools.perf.harness import GIB
from tools.perf.variants import (
    SETS,
    Measured,
    Variant,
    make_setups,
    measure,
    parse_variant,
    with_depth,
)
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.commands.plan import Waiting
from vlp_jax.errors import UserError
from vlp_jax.planning.target import Target, make_target

HAS_A_GATHER = 1
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute")
HEADS = (
    "variant",
    "examples a chip",
    "needed GiB",
    "fits",
    "M cycles",
    "k cycles an example",
    "of base",
    "base / this",
    "GB moved",
    "MB moved an example",
    "of base",
    "TFLOP",
    "repeated",
    *COLLECTIVES,
    "compiled in s",
)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config.

    Raises:
      UserError: an argument that does not exist, or a number below 1.
    """
    parser = harness.make_parser("compile_variants", __doc__, config=False)
    add = parser.add_argument
    add("--topology", metavar="NAME", help="v4, v5e, v5p, v6e or tpu7x and a shape (v5e:2x2)")
    add(
        "--variant",
        metavar="NAME:KEY=VALUE[,KEY=VALUE]",
        action="append",
        default=[],
        help="a variant; NAME alone is the config as it is",
    )
    add("--set", choices=SETS, help="a list of variants; --list prints them")
    add("--list", action="store_true", help="print the lists, and end")
    add("--base", metavar="NAME", help="the variant of ratio 1 (default: the first)")
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
    return parse_with_overrides(parser, argv, "batch_per_chip")


def list_sets() -> str:
    """Returns the sets by name, with the overrides of each variant."""
    lines = []
    for name, variants in SETS.items():
        lines.append(f"{name}:")
        lines += [f"  {one.name}: {', '.join(one.overrides) or 'the config'}" for one in variants]
    return "\n".join(lines)


def chosen_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Returns the variants of the set, then the given ones; the base comes first.

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
    # A stable sort: the base moves to the front, and the rest keeps its order.
    return sorted(found, key=lambda one: one.name != (arguments.base or names[0]))


def compile_all(
    arguments: argparse.Namespace, overrides: list[str], target: Target, argv: Sequence[str]
) -> list[Measured]:
    """Compiles each variant at each size of the batch.

    Raises:
      UserError: a mistake in the config or a variant; before anything is compiled.
    """
    if not arguments.config:
        raise UserError("--config is missing; see --help")
    variants = chosen_variants(arguments)
    config = load_config(arguments.config, overrides)
    if arguments.depth is not None:
        config = with_depth(config, arguments.depth)
    sizes = arguments.batch_per_chip
    setups = make_setups(config, target, variants, sizes, arguments.epoch_examples)
    waiting, found = Waiting(), []
    for variant, size, setup in setups:
        with waiting(f"compile {variant.name} with {size:,} examples a chip"):
            found.append(measure(variant, size, setup, target))
        # A compile takes minutes: the table comes at the very end.
        print(one_line(found[-1]), file=sys.stderr, flush=True)
        content = {"variants": as_json(found, found[0])}  # of the variants so far
        harness.write_json(arguments.json, "compile_variants", argv, content)
    return found


def per_example(one: Measured) -> tuple[float | None, float | None]:
    """Returns (cycles, bytes moved) for each example of a device; None if it was not compiled."""
    if one.cycles is None:
        return None, None
    return one.cycles / one.per_chip, one.traffic / one.per_chip


def ratios(this: Measured, base: Measured) -> tuple[float | None, float | None]:
    """Returns cycles and bytes of an example, over the base's; None where not known."""
    pairs = zip(per_example(this), per_example(base), strict=True)
    cycles, moved = (one / other if one and other else None for one, other in pairs)
    return cycles, moved


def _cell(value: float | None, text: str, factor: float = 1.0, mark: str = "") -> str:
    return "" if value is None else f"{value / factor:{text}}{mark}"


def row(one: Measured, base: Measured) -> list[str]:
    """Returns the cells of a variant, below `HEADS`."""
    cycles, moved = per_example(one)
    of_cycles, of_moved = ratios(one, base)
    mark = "+" if one.pallas_runs else ""
    first = ", first estimate" if one.preliminary else ""
    return [
        one.variant.name,
        f"{one.per_chip:,}",
        f"{one.needed / GIB:.2f}",
        "yes" if one.fits else f"no{first}",
        _cell(one.cycles, ",.1f", 1e6, mark),
        _cell(cycles, ",.1f", 1e3, mark),
        _cell(of_cycles, ".3f", mark=mark),
        "" if of_cycles is None else f"{1 / of_cycles:.2f}",
        _cell(one.traffic, ",.1f", 1e9),
        _cell(moved, ",.1f", 1e6),
        _cell(of_moved, ".3f"),
        f"{one.flops / 1e12:,.2f}",
        f"{one.repeated}",
        *(_collective(one, kind) for kind in COLLECTIVES),
        f"{one.compile_seconds:.0f}",
    ]


def _collective(one: Measured, kind: str) -> str:
    runs, sent = one.sent.get(kind, (0, 0))
    return f"{runs:g}, {sent / 1e6:,.1f} MB" if runs else ""


def one_line(one: Measured) -> str:
    """Returns a line on a variant, for a person who waits for the table."""
    cells = row(one, one)
    cycles = f", {cells[4]} M cycles, {cells[8]} GB moved" if one.cycles is not None else ""
    fits = f"{cells[2]} of {one.available / GIB:.2f} GiB, fits: {cells[3]}"
    return f"  {cells[0]}, {cells[1]} examples a chip: {fits}{cycles}"


def table(found: Sequence[Measured], base: Measured) -> str:
    """Returns the table in Markdown, and the lines below it."""
    lines = [harness.markdown(HEADS, [row(one, base) for one in found]), ""]
    for one in found:
        where = f"{one.variant.name} at {one.per_chip:,} a chip"
        if one.cycles is not None:
            told = "; ".join(one.gathers) or "no all-gather of embeddings"
            lines.append(f"- {where}: {told}")
        lines += [f"- {where}: {note}" for note in one.notes]
    return "\n".join(lines)


def as_json(found: Sequence[Measured], base: Measured) -> list[dict[str, Any]]:
    """Returns all figures of each variant, with its ratios."""
    told = []
    for one in found:
        cycles, moved = ratios(one, base)
        more = {"fits": one.fits, "cycles_of_base": cycles, "traffic_of_base": moved}
        told.append({**dataclasses.asdict(one), **more})
    return told


def refused_gathers(names: Sequence[str], found: Sequence[Measured]) -> list[str]:
    """Returns a line for each variant of `names` that gathers embeddings or was not compiled."""
    lines = []
    for one in found:
        if one.variant.name in names and (one.gathers or one.cycles is None):
            told = ", ".join(one.gathers) or "it was not compiled"
            lines.append(f"{one.variant.name} at {one.per_chip:,} a chip: {told}")
    return lines


def command(argv: list[str]) -> int:
    """Compiles, prints and writes; returns the exit status.

    Raises:
      UserError: a mistake in the arguments or the config.
    """
    arguments, overrides = parse(argv)
    if arguments.list:
        print(list_sets())
        return 0
    if not arguments.topology:
        raise UserError("--topology is missing; see --help")
    # A topology needs no devices, so JAX must not look for any but the CPU.
    jax.config.update("jax_platforms", "cpu")
    target = make_target(arguments.topology)
    if not target.compiles:
        raise UserError(f"there is no compiler here for {target.name}: give a TPU topology")
    found = compile_all(arguments, overrides, target, argv)
    print(table(found, found[0]))
    refused = refused_gathers(arguments.no_embedding_gathers, found)
    for line in refused:
        print(f"embeddings are gathered: {line}", file=sys.stderr)
    return HAS_A_GATHER if refused else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    return harness.run(command, argv)


if __name__ == "__main__":
    sys.exit(main())

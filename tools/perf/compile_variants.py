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
import re
import sys
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from tools.perf import harness
from tools.perf.harness import GIB
from vlp_jax import config as config_lib
from vlp_jax.arguments import load_config, parse_with_overrides
from vlp_jax.commands.plan import Waiting
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.mesh import batch_shards
from vlp_jax.planning import report, traffic
from vlp_jax.planning.plan import Plan, make_plan, make_setup_for
from vlp_jax.planning.report import Findings
from vlp_jax.planning.search import sections
from vlp_jax.planning.target import Target, make_target
from vlp_jax.training.setup import Setup

HAS_A_GATHER = 1
COLLECTIVES = ("all-gather", "all-reduce", "collective-permute")
HEADS = (
    *("variant", "examples a chip", "needed GiB", "fits", "M cycles", "k cycles an example"),
    *("of base", "GB moved", "MB moved an example", "of base", "TFLOP", *COLLECTIVES),
    "compiled in s",
)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, and its overrides of the config: ("objective.remat=full", ...)."""

    name: str
    overrides: tuple[str, ...] = ()


def _values(key: str, *values: str) -> tuple[str, ...]:
    return tuple(f"{value}:objective.{key}={value}" for value in values)


# As --variant takes them. Ratios refer to the first variant of a set.
SETS: dict[str, tuple[str, ...]] = {
    "attention": _values("attention", "xla", "xla_bf16", "xla_padded", "pallas"),
    "remat": _values("remat", "none", "dots", "names", "names_lean", "offload", "full"),
    "memory": (
        "as it is",
        "microbatches 2:microbatches=2",
        "microbatches 4:microbatches=4",
        "state sharded:mesh.preset=fsdp",
        "Adam:optimizer.name=adamw",
        "full remat:objective.remat=full",
    ),
    "loss": (
        *_values("loss_form", "plain", "blocked"),
        "blocks of 1024:objective.loss_form=blocked,objective.loss_block_size=1024",
    ),
    "precision": _values("dtype", "bfloat16", "float32"),
    "layers": ("scanned:objective.scan_layers=True", "unrolled:objective.scan_layers=False"),
    "tokens": (
        "196 tokens:objective.image.image_size=224",
        "256 tokens:objective.image.image_size=256",
    ),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """The plan of one variant with `per_chip` examples a device, and the time to compile it."""

    variant: Variant
    per_chip: int
    plan: Plan
    compile_seconds: float

    @property
    def gathers(self) -> list[str]:
        """The collectives of a step that bring a device the embeddings of other devices, in words.

        They are known by their shape: examples of several devices by the width of the embedding
        (`objective.embed_dim`). Where a parameter, or a layer of a stack, has just this shape too,
        the words say so: a batch of another size tells them apart.
        """
        setup = self.plan.setup
        shapes = [leaf.shape for leaf in jax.tree.leaves(setup.abstract)]
        # Of stacked layers a collective moves one at a time.
        shapes += [shape[1:] for shape in shapes]
        found, shards = self.plan.compiled.collectives, batch_shards(setup.mesh)
        return [
            line
            for width in sorted({s.get("embed_dim") for s in sections(setup.config)} - {None})
            for line in traffic.gathered_rows(found, self.per_chip, width, shards, shapes)
        ]


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Returns the arguments, and the overrides of the config."""
    parser = harness.make_parser("compile_variants", __doc__, config=False)
    add = parser.add_argument
    add("--topology", metavar="NAME", help="v4, v5e, v5p, v6e or tpu7x and a shape (v5e:2x2)")
    told = "a variant; NAME alone is the config as it is; can be given several times"
    form = "NAME:KEY=VALUE[,KEY=VALUE]"
    add("--variant", metavar=form, action="append", default=[], help=told)
    add("--set", choices=SETS, help="a list of variants; --list prints them")
    add("--list", action="store_true", help="print the lists, and end")
    add("--batch-per-chip", type=int, nargs="+", default=[], metavar="N", help="examples a device")
    add("--epoch-examples", type=int, metavar="N", help="examples of the training set")
    told = "fail if one of these variants gathers the embeddings of other devices"
    add("--no-embedding-gathers", metavar="NAME", nargs="+", default=[], help=told)
    return parse_with_overrides(parser, argv, "batch_per_chip")


def parse_variant(text: str) -> Variant:
    """Reads NAME:KEY=VALUE,KEY=VALUE, or NAME alone for the config as it is.

    Raises:
      UserError: the text has neither form.
    """
    name, colon, rest = text.partition(":")
    # A comma inside of a value, as in a tuple, is followed by no KEY=.
    overrides = tuple(re.split(r",(?=[\w.]+=)", rest)) if colon else ()
    if not name or any("=" not in one for one in overrides):
        raise UserError(f"--variant {text}: it is NAME:KEY=VALUE,KEY=VALUE, or NAME alone")
    return Variant(name, tuple(one.removeprefix("config.") for one in overrides))


def make_setups(
    config: ConfigDict,
    target: Target,
    variants: Sequence[Variant],
    per_chip: Sequence[int],
    epoch_examples: int | None,
) -> list[tuple[Variant, int, Setup]]:
    """Makes the setup of each variant at each size, so that a mistake costs no compilation.

    Args:
      per_chip: numbers of examples a device; empty for the batch of each config.

    Raises:
      UserError: the config with a variant does not fit the devices or itself; it names the variant.
    """
    found = []
    for size in per_chip or (None,):
        for variant in variants:
            try:
                changed = config.copy_and_resolve_references()
                config_lib.override(changed, list(variant.overrides))
                shards = batch_shards(mesh_lib.make_mesh(changed.mesh, target.devices))
                if size is not None:
                    with changed.unlocked():
                        changed.batch_size = size * shards
                # All setups before the first compile: a typing error costs seconds, not hours.
                setup = make_setup_for(changed, target, epoch_examples)
            except UserError as error:
                raise UserError(f"variant {variant.name}: {error}") from error
            found.append((variant, changed.batch_size // shards, setup))
    return found


def measure(variant: Variant, per_chip: int, setup: Setup, target: Target) -> Measured:
    """Compiles the step of `setup` and reads the program."""
    begin = time.perf_counter()
    plan = make_plan(setup, target)
    return Measured(variant, per_chip, plan, time.perf_counter() - begin)


def chosen_variants(arguments: argparse.Namespace) -> list[Variant]:
    """Returns the variants of the set, then the given ones.

    Raises:
      UserError: there are none, two have the same name, or an option names one that is not there.
    """
    found = [parse_variant(text) for text in (*SETS.get(arguments.set, ()), *arguments.variant)]
    names = [one.name for one in found]
    if not found:
        raise UserError("nothing to compile: give --variant or --set; --list tells the sets")
    if len(set(names)) < len(names):
        raise UserError(f"two variants have the same name: {', '.join(sorted(names))}")
    for name in arguments.no_embedding_gathers:
        if name not in names:
            raise UserError(f"there is no variant {name!r} (there are: {', '.join(names)})")
    return found


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
    sizes = arguments.batch_per_chip
    setups = make_setups(config, target, variants, sizes, arguments.epoch_examples)
    waiting, found = Waiting(), []
    for variant, size, setup in setups:
        with waiting(f"compile {variant.name} with {size:,} examples a chip"):
            found.append(measure(variant, size, setup, target))
        # A compile takes minutes: the table comes at the very end.
        print(one_line(found[-1]), file=sys.stderr, flush=True)
        content = {"variants": [as_json(one, found[0]) for one in found]}
        harness.write_json(arguments.json, "compile_variants", argv, content)
    return found


def ratios(this: Measured, base: Measured) -> tuple[float | None, float | None]:
    """Returns cycles and bytes of an example, over the base's; None where not known."""
    one, other = this.plan.compiled, base.plan.compiled
    if one is None or other is None:
        return None, None
    per_example = base.per_chip / this.per_chip
    cycles = one.cycles / other.cycles * per_example if other.cycles else None
    return cycles, one.hbm_traffic / other.hbm_traffic * per_example


def row(one: Measured, base: Measured) -> list[str]:
    """Returns the cells of a variant, below `HEADS`."""

    def cell(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    plan, compiled, size = one.plan, one.plan.compiled, one.per_chip
    of_cycles, of_moved = ratios(one, base)
    mark = "+" if compiled and compiled.pallas.runs else ""
    first = ", first estimate" if plan.preliminary else ""
    cycles, moved = (compiled.cycles, compiled.hbm_traffic) if compiled else (None, None)
    both = [(x / 1e6, x / 1e3 / size) if compiled else (None, None) for x in (cycles, moved)]
    sent, runs = Counter(), Counter()
    for collective in compiled.collectives if compiled else ():
        sent[collective.kind] += collective.step_bytes
        runs[collective.kind] += collective.times
    return [
        *(one.variant.name, f"{size:,}", f"{plan.needed / GIB:.2f}"),
        "yes" if plan.fits else f"no{first}",
        *(f"{cell(value, ',.1f')}{mark}" for value in both[0]),
        f"{cell(of_cycles, '.3f')}{mark}",
        *(cell(value and value / 1e3, ",.1f") for value in both[1]),
        cell(of_moved, ".3f"),
        f"{plan.hardware.total / plan.setup.mesh.size / 1e12:,.2f}",
        *(f"{runs[k]:g}, {sent[k] / 1e6:,.1f} MB" if runs[k] else "" for k in COLLECTIVES),
        f"{one.compile_seconds:.0f}",
    ]


def one_line(one: Measured) -> str:
    """Returns a line on a variant, for a person who waits for the table."""
    cells = row(one, one)
    cycles = f", {cells[4]} M cycles, {cells[7]} GB moved" if one.plan.compiled else ""
    return f"  {cells[0]}, {cells[1]} a chip: {cells[2]} GiB, fits: {cells[3]}{cycles}"


def table(found: Sequence[Measured], base: Measured) -> str:
    """Returns the table in Markdown, and the lines below it."""
    lines = [harness.markdown(HEADS, [row(one, base) for one in found]), ""]
    for one in found:
        where = f"{one.variant.name} at {one.per_chip:,} a chip"
        if one.plan.compiled:
            told = "; ".join(one.gathers) or "no all-gather of embeddings"
            lines += [f"- {where}: {line}" for line in (told, *one.plan.compiled.notes)]
    return "\n".join(lines)


def as_json(one: Measured, base: Measured) -> dict[str, Any]:
    """Returns all figures of a variant, with its ratios."""
    cycles, moved = ratios(one, base)
    return {
        "variant": dataclasses.asdict(one.variant),
        "per_chip": one.per_chip,
        "compile_seconds": one.compile_seconds,
        "cycles_of_base": cycles,
        "traffic_of_base": moved,
        "gathers": one.gathers if one.plan.compiled else None,
        **report.as_json(Findings(one.plan), {}),
    }


def refused_gathers(names: Sequence[str], found: Sequence[Measured]) -> list[str]:
    """Returns a line for each variant of `names` that gathers embeddings or was not compiled."""
    lines = []
    for one in found:
        told = one.gathers if one.plan.compiled else ["it was not compiled"]
        if one.variant.name in names and told:
            lines.append(f"{one.variant.name} at {one.per_chip:,} a chip: {', '.join(told)}")
    return lines


def command(argv: list[str]) -> int:
    """Compiles, prints and writes; returns the exit status."""
    arguments, overrides = parse(argv)
    if arguments.list:
        print("\n".join(f"{name}:\n  " + "\n  ".join(texts) for name, texts in SETS.items()))
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


main = harness.main_of(command)

if __name__ == "__main__":
    sys.exit(main())

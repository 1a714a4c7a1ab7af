"""Variants of a training step, compiled for TPUs that are not here, and named sets of them."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from collections.abc import Sequence

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vlp_jax import config as config_lib
from vlp_jax.errors import UserError
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.mesh import BATCH_AXES
from vlp_jax.planning import traffic
from vlp_jax.planning.compile import OutOfMemory, compile_setup
from vlp_jax.planning.options import sections
from vlp_jax.planning.pallas_calls import PallasCalls
from vlp_jax.planning.plan import (
    Compiled,
    make_setup_for,
    read_program,
    step_flops,
    waiting_bytes,
)
from vlp_jax.planning.target import Target
from vlp_jax.training.setup import Setup

TOWERS = ("image", "text", "decoder")  # sections of an objective that may have a depth
# The figures of a step that the compiler refused: nothing was read.
NOTHING = Compiled(0.0, [], 0.0, PallasCalls(), 0, ())


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name, and its overrides of the config: ("objective.remat=full", ...)."""

    name: str
    overrides: tuple[str, ...] = ()


def _values(key: str, *values: object) -> tuple[Variant, ...]:
    return tuple(Variant(str(value), (f"objective.{key}={value}",)) for value in values)


# Ratios refer to the first variant of a set.
SETS: dict[str, tuple[Variant, ...]] = {
    "attention": _values("attention", "xla", "xla_bf16", "xla_padded", "pallas"),
    "remat": _values("remat", "none", "dots", "names", "names_lean", "offload", "full"),
    "memory": (
        Variant("as it is"),
        Variant("microbatches 2", ("microbatches=2",)),
        Variant("microbatches 4", ("microbatches=4",)),
        Variant("state sharded", ("mesh.preset=fsdp",)),
        Variant("Adam", ("optimizer.name=adamw",)),
        Variant("full remat", ("objective.remat=full",)),
    ),
    "loss": (
        *_values("loss_form", "plain", "blocked"),
        Variant(
            "blocks of 1024", ("objective.loss_form=blocked", "objective.loss_block_size=1024")
        ),
    ),
    "precision": _values("dtype", "bfloat16", "float32"),
    "layers": (
        Variant("scanned", ("objective.scan_layers=True",)),
        Variant("unrolled", ("objective.scan_layers=False",)),
    ),
    "tokens": (
        Variant("196 tokens", ("objective.image.image_size=224",)),
        Variant("256 tokens", ("objective.image.image_size=256",)),
    ),
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """The compiler's figures of one variant. Bytes, cycles and FLOPs are of a device in a step.

    Attributes:
      per_chip: examples of a device.
      needed: main memory, with the batches that wait; the compiler's demand if it refused.
      cycles: its estimate of the kernels, with Pallas calls at their roofline; None if it refused.
      pallas_cycles: the part of the cycles that Pallas calls have.
      traffic: bytes to and from main memory; None if it refused.
      flops: of products and convolutions, with all that is computed again.
      repeated: instructions that the compiler itself computes again to save memory.
      sent: kind of collective -> (runs, bytes sent).
      gathers: collectives that bring a device the embeddings of the others, in words.
      notes: parts of the program that could not be read, in words.
    """

    variant: Variant
    per_chip: int
    needed: int
    available: int
    preliminary: bool
    cycles: float | None
    pallas_cycles: float
    pallas_runs: float
    traffic: float | None
    flops: float
    repeated: int
    sent: dict[str, tuple[float, float]]
    gathers: tuple[str, ...]
    notes: tuple[str, ...]
    compile_seconds: float

    @property
    def fits(self) -> bool:
        """True if the step needs no more main memory than the compiler grants."""
        return self.cycles is not None and self.needed <= self.available


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


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """Returns a copy of `config` with `overrides`.

    Raises:
      UserError: see `config.override`.
    """
    config = config.copy_and_resolve_references()
    config_lib.override(config, list(overrides))
    return config


def with_depth(config: ConfigDict, depth: int) -> ConfigDict:
    """Returns a copy of `config` whose towers have `depth` layers."""
    config = config.copy_and_resolve_references()
    with config.unlocked():
        for section in sections(config):
            for tower in TOWERS:
                if isinstance(section.get(tower), ConfigDict):
                    section[tower].depth = depth
    return config


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
                changed = with_overrides(config, variant.overrides)
                shards = _shards(mesh_lib.make_mesh(changed.mesh, target.devices))
                if size is not None:
                    with changed.unlocked():
                        changed.batch_size = size * shards
                # All setups before the first compile: a typing error costs seconds, not hours.
                setup = make_setup_for(changed, target, epoch_examples)
            except UserError as error:
                raise UserError(f"variant {variant.name}: {error}") from error
            found.append((variant, changed.batch_size // shards, setup))
    return found


def _shards(mesh: Mesh) -> int:
    """Number of devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def measure(variant: Variant, per_chip: int, setup: Setup, target: Target) -> Measured:
    """Compiles the step of `setup` and reads the program."""
    begin = time.perf_counter()
    program = compile_setup(setup)
    seconds = time.perf_counter() - begin
    refused = isinstance(program, OutOfMemory)
    compiled = NOTHING if refused else read_program(program, setup, target.chip)
    return Measured(
        variant=variant,
        per_chip=per_chip,
        needed=(program.needed if refused else program.bytes) + waiting_bytes(setup),
        available=program.available if refused else target.chip.hbm_bytes,
        preliminary=refused and program.preliminary,
        cycles=None if refused else compiled.cycles,
        pallas_cycles=compiled.pallas.cycles(target.chip.clock),
        pallas_runs=compiled.pallas.runs,
        traffic=None if refused else compiled.hbm_traffic,
        flops=step_flops(setup).total / setup.mesh.size,
        repeated=compiled.repeated,
        sent=_sent(compiled.collectives),
        gathers=embedding_gathers(compiled.collectives, setup),
        notes=compiled.notes,
        compile_seconds=seconds,
    )


def _sent(found: Sequence[traffic.Collective]) -> dict[str, tuple[float, float]]:
    table: dict[str, tuple[float, float]] = {}
    for one in found:
        runs, sent = table.get(one.kind, (0.0, 0.0))
        table[one.kind] = (runs + one.times, sent + one.step_bytes)
    return table


def embedding_gathers(found: Sequence[traffic.Collective], setup: Setup) -> tuple[str, ...]:
    """Returns the collectives of a step that bring a device the embeddings of other devices.

    They are known by their shape: examples of several devices by the width of the embedding
    (`objective.embed_dim`). Where a parameter, or a layer of a stack, has just this shape too, the
    words say so: a batch of another size tells them apart.
    """
    widths = {s.get("embed_dim") for s in sections(setup.config)} - {None}
    shards = _shards(setup.mesh)
    rows = setup.config.batch_size // shards
    shapes = [leaf.shape for leaf in jax.tree.leaves(setup.abstract)]
    # Of stacked layers a collective moves one at a time.
    shapes += [shape[1:] for shape in shapes]
    return tuple(
        line
        for width in sorted(widths)
        for line in traffic.gathered_rows(list(found), rows, width, shards, shapes)
    )

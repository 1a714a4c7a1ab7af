"""Variants of a training step, compiled for the same devices and set beside each other."""

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
from vlp_jax.planning.plan import make_setup_for, read_program, step_flops, waiting_bytes
from vlp_jax.planning.target import Target
from vlp_jax.training.setup import Setup

TOWERS = ("image", "text", "decoder")  # sections of an objective that may have a depth


@dataclasses.dataclass(frozen=True)
class Variant:
    """A name and what it changes in the config: ("objective.remat=full", ...)."""

    name: str
    overrides: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the compiler says of one variant. Bytes, cycles and FLOPs are of a device in a step.

    Attributes:
      per_chip: examples of a device.
      needed: main memory, with the batches that wait; what the compiler asked for if it refused.
      cycles: its estimate of the kernels, with Pallas calls at their roofline; None if it refused.
      pallas_cycles: the part of these that Pallas calls have.
      traffic: bytes to and from main memory.
      flops: of products and convolutions, with what is computed again.
      repeated: instructions that the compiler itself computes again to save memory.
      sent: kind of collective -> (runs, bytes sent).
      gathers: collectives that bring a device the embeddings of the others, in words.
      notes: what could not be read, in words.
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
        """In the main memory that the compiler grants."""
        return self.cycles is not None and self.needed <= self.available


def parse_variant(text: str) -> Variant:
    """NAME:KEY=VALUE,KEY=VALUE, or NAME alone for the config as it is.

    Raises:
      UserError: it is neither.
    """
    name, colon, rest = text.partition(":")
    overrides = tuple(re.split(r",(?=[\w.]+=)", rest)) if colon else ()
    if not name or any("=" not in one for one in overrides):
        raise UserError(f"--variant {text}: it is NAME:KEY=VALUE,KEY=VALUE, or NAME alone")
    return Variant(name, tuple(one.removeprefix("config.") for one in overrides))


def with_overrides(config: ConfigDict, overrides: Sequence[str]) -> ConfigDict:
    """A copy of `config` with `overrides`.

    Raises:
      UserError: see `config.override`.
    """
    config = config.copy_and_resolve_references()
    config_lib.override(config, list(overrides))
    return config


def with_depth(config: ConfigDict, depth: int) -> ConfigDict:
    """A copy of `config` whose towers have `depth` layers."""
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
    """Each variant at each number of examples a device, so that a mistake costs no compilation.

    Args:
      per_chip: empty for what each config has.

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
                setup = make_setup_for(changed, target, epoch_examples)
            except UserError as error:
                raise UserError(f"variant {variant.name}: {error}") from error
            found.append((variant, changed.batch_size // shards, setup))
    return found


def _shards(mesh: Mesh) -> int:
    """Devices that share a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def measure(variant: Variant, per_chip: int, setup: Setup, target: Target) -> Measured:
    """Compiles the step of `setup` and reads what came out."""
    begin = time.perf_counter()
    program = compile_setup(setup)
    seconds = time.perf_counter() - begin
    waiting = waiting_bytes(setup)
    counted = step_flops(setup)
    common = {
        "variant": variant,
        "per_chip": per_chip,
        "flops": counted.total / setup.mesh.size,
        "compile_seconds": seconds,
    }
    if isinstance(program, OutOfMemory):
        return Measured(
            **common,
            needed=program.needed + waiting,
            available=program.available,
            preliminary=program.preliminary,
            cycles=None,
            pallas_cycles=0.0,
            pallas_runs=0.0,
            traffic=None,
            repeated=0,
            sent={},
            gathers=(),
            notes=(),
        )
    compiled = read_program(program, setup, target.chip)
    return Measured(
        **common,
        needed=program.bytes + waiting,
        available=target.chip.hbm_bytes,
        preliminary=False,
        cycles=compiled.cycles,
        pallas_cycles=compiled.pallas.cycles(target.chip.clock),
        pallas_runs=compiled.pallas.runs,
        traffic=compiled.hbm_traffic,
        repeated=compiled.repeated,
        sent=_sent(compiled.collectives),
        gathers=embedding_gathers(compiled.collectives, setup),
        notes=compiled.notes,
    )


def _sent(found: Sequence[traffic.Collective]) -> dict[str, tuple[float, float]]:
    table: dict[str, tuple[float, float]] = {}
    for one in found:
        runs, sent = table.get(one.kind, (0.0, 0.0))
        table[one.kind] = (runs + one.times, sent + one.step_bytes)
    return table


def embedding_gathers(found: Sequence[traffic.Collective], setup: Setup) -> tuple[str, ...]:
    """The collectives of a step that bring a device the embeddings of the other devices.

    They are known by their shape: examples of several devices by the width of the embedding
    (`objective.embed_dim`). Where a parameter, or a layer of a stack, has just this shape too, the
    words say so: a batch of another size tells them apart.
    """
    widths = {s.get("embed_dim") for s in sections(setup.config)} - {None}
    shards = _shards(setup.mesh)
    rows = setup.config.batch_size // shards
    shapes = [leaf.shape for leaf in jax.tree.leaves(setup.abstract)]
    shapes += [shape[1:] for shape in shapes]
    return tuple(
        line
        for width in sorted(widths)
        for line in traffic.gathered_rows(list(found), rows, width, shards, shapes)
    )

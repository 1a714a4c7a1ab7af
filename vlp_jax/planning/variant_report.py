"""Variants of a step beside each other: as Markdown, and as figures for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from vlp_jax.planning.micro_programs import MicroMeasured
from vlp_jax.planning.variants import Measured

GIB = 2**30
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
    "all-gather",
    "all-reduce",
    "collective-permute",
    "compiled in s",
)
MICRO_HEADS = ("form", "k cycles", "of base", "MB moved", "of base", "MiB temporaries", "GFLOP")


def per_example(one: Measured) -> tuple[float | None, float | None]:
    """(cycles, bytes moved) for each example of a device; None if it was not compiled."""
    if one.cycles is None:
        return None, None
    return one.cycles / one.per_chip, one.traffic / one.per_chip


def ratios(this: Measured, base: Measured) -> tuple[float | None, float | None]:
    """Cycles and bytes of an example, over those of `base`; None where they are not known."""
    pairs = zip(per_example(this), per_example(base), strict=True)
    cycles, moved = (one / other if one and other else None for one, other in pairs)
    return cycles, moved


def _cell(value: float | None, text: str, factor: float = 1.0, mark: str = "") -> str:
    return "" if value is None else f"{value / factor:{text}}{mark}"


def row(one: Measured, base: Measured) -> list[str]:
    """The cells of a variant."""
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
        *(_collective(one, kind) for kind in HEADS[13:16]),
        f"{one.compile_seconds:.0f}",
    ]


def _collective(one: Measured, kind: str) -> str:
    runs, sent = one.sent.get(kind, (0, 0))
    return f"{runs:g}, {sent / 1e6:,.1f} MB" if runs else ""


def one_line(one: Measured) -> str:
    """What a person who waits for the table is told of each variant."""
    cells = row(one, one)
    cycles = f", {cells[4]} M cycles, {cells[8]} GB moved" if one.cycles is not None else ""
    fits = f"{cells[2]} of {one.available / GIB:.2f} GiB, fits: {cells[3]}"
    return f"  {cells[0]}, {cells[1]} examples a chip: {fits}{cycles}"


def markdown(found: Sequence[Measured], base: Measured) -> str:
    """A table, and the lines below it."""
    lines = _table(HEADS, [row(one, base) for one in found])
    for one in found:
        where = f"{one.variant.name} at {one.per_chip:,} a chip"
        if one.cycles is not None:
            told = "; ".join(one.gathers) or "no all-gather of embeddings"
            lines.append(f"- {where}: {told}")
        lines += [f"- {where}: {note}" for note in one.notes]
    return "\n".join(lines)


def micro_markdown(found: Sequence[MicroMeasured]) -> str:
    """The same of small programs; the first is the base."""
    base = found[0]
    rows = [
        [
            one.name,
            f"{one.cycles / 1e3:,.1f}",
            f"{one.cycles / base.cycles:.3f}",
            f"{one.traffic / 1e6:,.1f}",
            f"{one.traffic / base.traffic:.3f}",
            f"{one.temporaries / 2**20:,.1f}",
            f"{one.flops / 1e9:,.2f}",
        ]
        for one in found
    ]
    return "\n".join(_table(MICRO_HEADS, rows))


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def as_json(found: Sequence[Measured], base: Measured | None) -> list[dict[str, Any]]:
    """All figures of each variant, with its ratios."""
    told = []
    for one in found:
        cycles, moved = ratios(one, base) if base else (None, None)
        more = {"fits": one.fits, "cycles_of_base": cycles, "traffic_of_base": moved}
        told.append({**dataclasses.asdict(one), **more})
    return told

"""A plan as a table for people, and as JSON for programs."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.planning import traffic
from vlp_jax.planning.compile import Program
from vlp_jax.planning.plan import Plan
from vlp_jax.planning.search import Largest, Policy, advice, remat_of

GIB, MIB = 2**30, 2**20


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a whole run without evaluations and checkpoints, if its steps take so long.

    Attributes:
      examples_per_second: of all devices.
      mfu: model FLOPs utilisation: share of the peak of all devices that the model's own FLOPs take
        (Chowdhery et al. 2022, "PaLM", appendix B); None without a peak.
      price: in the currency of the price; None without one.
    """

    step_seconds: float
    examples_per_second: float
    mfu: float | None
    days: float
    chip_hours: float
    price: float | None


@dataclasses.dataclass(frozen=True)
class Findings:
    """A plan, with the assumptions and the search that the user asked for.

    Attributes:
      mfu: assumed, for a further row of costs.
      search: the policies, the one that was chosen, and the largest batch with it.
    """

    plan: Plan
    price_per_chip_hour: float | None = None
    mfu: float | None = None
    search: tuple[list[Policy], str, Largest] | None = None

    def costs(self) -> dict[str, Cost]:
        """Returns the cost of the run for each assumption on the time of its steps."""
        plan, roofline = self.plan, self.plan.roofline
        peak = peak_flops(plan)
        seconds = {
            "roofline, all at once": roofline.step_seconds,
            "roofline, one by one": roofline.serial_seconds,
            "compiler's cycles, uncalibrated": plan.cycle_seconds,
        }
        if plan.compiled is None:
            # Without memory and network it would be the same figure again.
            del seconds["roofline, one by one"]
        if self.mfu and peak:
            seconds[f"at {self.mfu:.0%} MFU"] = plan.model_flops / (self.mfu * peak)
        return {name: self._cost(value, peak) for name, value in seconds.items() if value}

    def _cost(self, step_seconds: float, peak: float | None) -> Cost:
        plan, price = self.plan, self.price_per_chip_hour
        # Chips are paid for while they wait, too: evaluations and checkpoints come on top.
        hours = plan.setup.units.total_steps * step_seconds / 3600
        return Cost(
            step_seconds=step_seconds,
            examples_per_second=plan.setup.config.batch_size / step_seconds,
            mfu=plan.model_flops / step_seconds / peak if peak else None,
            days=hours / 24,
            chip_hours=hours * plan.target.chips,
            price=None if price is None else hours * plan.target.chips * price,
        )


def peak_flops(plan: Plan) -> float | None:
    """Returns the peak of all devices together; None where it is not known."""
    if plan.target.chip is None:
        return None
    return plan.setup.mesh.size * plan.target.chip.peak_flops(plan.setup.objective.compute_dtype)


def notes(findings: Findings) -> list[str]:
    """Returns notes on the figures for a reader."""
    plan = findings.plan
    found = [f"FLOPs not counted: {what}" for what in plan.hardware.uncounted]
    # An assumed MFU above the bound is a mistake in the assumption, not good news.
    bound = findings.costs().get("roofline, all at once")
    if findings.mfu and bound and bound.mfu and findings.mfu > bound.mfu:
        found.append(
            f"{findings.mfu:.0%} MFU cannot be reached: the roofline allows {bound.mfu:.1%}"
        )
    if plan.compiled is None:
        if plan.memory is None:
            found.append(
                "nothing was compiled: temporaries, traffic and whether the step fits are not "
                "known without the compiler; activations are an estimate"
            )
        return found
    found += plan.compiled.notes
    if plan.compiled.repeated:
        found.append(
            f"to fit, the compiler itself computes {plan.compiled.repeated} instructions again; "
            "they are not in the FLOPs"
        )
    found.append(
        "the roofline is a bound that no step beats; cycles are the compiler's model, never "
        "compared with a TPU, and leave the network out"
    )
    return found


def as_json(findings: Findings, versions: dict[str, str]) -> dict[str, Any]:
    """Returns all figures: bytes and FLOPs, of a device unless they say otherwise."""
    plan = findings.plan
    program = plan.memory if isinstance(plan.memory, Program) else None
    compiled, roofline, config = plan.compiled, plan.roofline, plan.setup.config
    found = compiled.collectives if compiled else None
    result: dict[str, Any] = {
        "topology": plan.target.name,
        "devices": plan.setup.mesh.size,
        "chips": plan.target.chips,
        "mesh": dict(plan.setup.mesh.shape),
        "batch_size": config.batch_size,
        "microbatches": config.microbatches,
        "remat": remat_of(config),
        "versions": versions,
        "fits": plan.fits,
        "hbm_bytes": plan.needed,
        "hbm_available_bytes": plan.available,
        "params_bytes": plan.state.params.per_device,
        "params_bytes_all_devices": plan.state.params.total,
        "optimizer_bytes": plan.state.optimizer.per_device,
        "optimizer_bytes_all_devices": plan.state.optimizer.total,
        "waiting_batch_bytes": plan.waiting,
        "activation_bytes_estimate": plan.activations,
        "temp_bytes": program.temporaries if program else None,
        "code_bytes": program.code if program else None,
        "model_flops": plan.model_flops,
        "hardware_flops": plan.hardware.total,
        "hbm_traffic_bytes": compiled.hbm_traffic if compiled else None,
        "collective_bytes": traffic.by_kind_and_axis(found) if compiled else None,
        "collective_bytes_total": sum(one.step_bytes for one in found) if compiled else None,
        "roofline_seconds": dataclasses.asdict(roofline),
        "step_seconds": roofline.step_seconds,
        "bound_by": roofline.bound_by,
        "compiler_cycles": compiled.cycles if compiled else None,
        "pallas": dataclasses.asdict(compiled.pallas) if compiled else None,
        "steps": plan.setup.units.total_steps,
        "costs": {name: dataclasses.asdict(one) for name, one in findings.costs().items()},
        "notes": notes(findings),
    }
    if plan.fits is False:
        result["reason"] = reason(plan)
        result["advice"] = advice(plan)
    if findings.search:
        policies, chosen, largest = findings.search
        result["search"] = {
            "policies": [dataclasses.asdict(policy) for policy in policies],
            "remat": chosen,
            "largest": dataclasses.asdict(largest),
        }
    return result


def reason(plan: Plan) -> str:
    """Returns why a step does not fit, in one sentence with its figures."""
    state = plan.state.device
    if plan.memory is None:
        return f"the state takes {_gib(state)} of a device's {_gib(plan.available)}"
    rest = plan.needed - state
    first = ""
    if plan.preliminary:
        first = ", in the compiler's first estimate, before it saves what it can"
    return (
        f"the step takes {_gib(plan.needed)} of a device's {_gib(plan.available)}{first}: "
        f"{_gib(state)} of state and {_gib(rest)} of activations and other temporaries"
    )


def _gib(value: float | None) -> str:
    return "not known" if value is None else f"{value / GIB:.2f} GiB"


def as_table(findings: Findings) -> Group:
    """Returns the tables for a person."""
    plan = findings.plan
    parts: list[Any] = [_heading(plan), _memory(plan), _work(plan)]
    if plan.compiled and plan.compiled.collectives:
        parts.append(_collectives(plan))
    costs = findings.costs()
    if costs:
        parts.append(_costs(plan, costs))
    if findings.search:
        parts += _search(findings.search, plan)
    if plan.fits is False:
        parts.append(Text(f"does not fit: {reason(plan)}", style="bold red"))
        parts += [Text(f"  - {line}") for line in advice(plan)]
    parts += [Text(f"note: {note}", style="dim") for note in notes(findings)]
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    for index, column in enumerate(columns):
        # Rich would fold a number into two lines in a narrow terminal.
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def _heading(plan: Plan) -> Text:
    config, units = plan.setup.config, plan.setup.units
    verdict = {True: "fits", False: "does not fit", None: "not known whether it fits"}[plan.fits]
    line = (
        f"{plan.target.name}: {mesh_lib.describe(plan.setup.mesh)}\n"
        f"batch {config.batch_size:,}, {units.total_steps:,} steps, remat {remat_of(config)}, "
        f"microbatches {config.microbatches}: "
    )
    return Text(line).append(verdict, style="bold green" if plan.fits else "bold")


def _memory(plan: Plan) -> Table:
    table = _table("\nmemory of a device", "", "GiB", "all devices", "spread over")

    def row(name: str, value: float | None, total: float | None = None, over: float = 0) -> None:
        cells = ("" if x is None else f"{x / GIB:,.2f}" for x in (value, total))
        table.add_row(name, *cells, f"{over:.1f}" if over else "")

    for name, one in (("parameters", plan.state.params), ("optimizer", plan.state.optimizer)):
        row(name, one.per_device, one.total, one.total / one.per_device if one.per_device else 1.0)
    if isinstance(plan.memory, Program):
        row("activations and temporaries", plan.memory.temporaries)
        row("  of which kept for the backward pass, estimate", plan.activations)
        row("program", plan.memory.code)
    else:
        row("activations kept for the backward pass, estimate", plan.activations)
    row(f"batches that wait ({plan.setup.config.prefetch})", plan.waiting)
    if plan.needed is not None:
        row("needed", plan.needed)
    if plan.available is not None:
        row("available", plan.available)
    return table


def _work(plan: Plan) -> Table:
    roofline, devices = plan.roofline, plan.setup.mesh.size
    table = _table("\nwork of a device in a step", "", "", "seconds")

    def row(name: str, amount: str, seconds: float | None) -> None:
        bound = name == roofline.bound_by
        text = "" if seconds is None else f"{seconds:.4f}{' <- bound' if bound else ''}"
        table.add_row(name, amount, text)

    row("model FLOPs", f"{plan.model_flops / devices / 1e12:,.2f} TFLOP", None)
    row("compute", f"{plan.hardware.total / devices / 1e12:,.2f} TFLOP", roofline.compute)
    if plan.compiled:
        # Bytes on the links, in the ring form; payloads are smaller.
        sent = sum(one.step_bytes for one in plan.compiled.collectives)
        row("memory", f"{plan.compiled.hbm_traffic / 1e9:,.2f} GB", roofline.memory)
        row("network", f"{sent / 1e9:,.3f} GB", roofline.network)
        mark = "+" if plan.compiled.pallas.runs else ""
        cycles = f"{plan.compiled.cycles / 1e6:,.1f}{mark} M cycles"
        row("compiler's cycles", cycles, plan.cycle_seconds)
    return table


def _collectives(plan: Plan) -> Table:
    table = _table("\nsent by a device in a step", "collective", "axis", "MB", "runs")
    sent: Counter[tuple[str, str]] = Counter()
    runs: Counter[tuple[str, str]] = Counter()
    for one in plan.compiled.collectives:
        sent[one.kind, "+".join(one.axes)] += one.step_bytes
        runs[one.kind, "+".join(one.axes)] += one.times
    for key, size in sent.most_common():
        table.add_row(*key, f"{size / 1e6:,.2f}", f"{runs[key]:,.0f}")
    return table


def _costs(plan: Plan, costs: dict[str, Cost]) -> Table:
    titles = ["if steps take", "seconds", "examples/s", "MFU", "days", "chip-hours"]
    priced = any(one.price is not None for one in costs.values())
    table = _table("\nthe whole run", *titles, *(["price"] if priced else []))
    for name, one in costs.items():
        cells = [f"{one.step_seconds:.4f}", f"{one.examples_per_second:,.0f}"]
        cells.append("" if one.mfu is None else f"{one.mfu:.1%}")
        cells += [f"{one.days:,.2f}", f"{one.chip_hours:,.0f}"]
        table.add_row(name, *cells, *([f"{one.price:,.0f}"] if priced else []))
    return table


def _search(search: tuple[list[Policy], str, Largest], plan: Plan) -> list[Any]:
    policies, chosen, largest = search
    title = f"\nrematerialization at batch {plan.setup.config.batch_size:,}"
    table = _table(title, "policy", "TFLOP a device", "GiB", "fits")
    for policy in policies:
        flops = f"{policy.hardware_flops / plan.setup.mesh.size / 1e12:,.2f}"
        trial = policy.trial
        known = (f"{trial.needed / GIB:.2f}", "yes" if trial.fits else "no") if trial else ("", "")
        table.add_row(policy.name, flops, *known)
    if largest.batch_size is None:
        text = f"no batch down to {largest.quantum:,} fits with remat {chosen}"
    else:
        # The search may end at its limit of compiles before the next multiple was refused.
        surety = "the largest" if largest.exact else "the largest that was tried, of those that fit"
        text = f"{surety} batch with remat {chosen}, in steps of {largest.quantum:,}: "
        text += f"{largest.batch_size:,} ({largest.batch_size / plan.setup.mesh.size:g} a device)"
    trials = (
        f"  {one.batch_size:,}: {_gib(one.needed)}, {'fits' if one.fits else 'does not fit'}"
        for one in largest.trials
    )
    return [table, Text(text, style="bold"), *map(Text, trials)]

"""The least time of the Pallas kernels of a compiled TPU program, which has no estimate of it.

The TPU compiler writes `estimated_cycles` beside its own kernels, and nothing beside a Pallas call,
which is a custom call with the target `tpu_custom_call`. Here such a call takes the time of its
roofline: the longer of its FLOPs at the peak of the matrix units and its bytes at the bandwidth of
main memory. That is a bound and no estimate: work of the vector units, and the start of each
instance of the grid, are not in it.
"""

from __future__ import annotations

import dataclasses
import re

from vlp_jax.planning.chips import Chip
from vlp_jax.planning.hlo import Computation, Instruction, Module
from vlp_jax.planning.loops import Runs

TARGET = 'custom_call_target="tpu_custom_call"'
# `pl.CostEstimate` in the backend_config of the call, as jax writes it.
_COST = re.compile(r'"cost_estimate":\{([^}]*)\}')
_OWN_ESTIMATE = '"estimated_cycles":'


@dataclasses.dataclass(frozen=True)
class PallasCalls:
    """The Pallas calls of a device in one call of the program, summed.

    Attributes:
      runs: how often one of them runs.
      flops: by their cost estimates.
      bytes: by their cost estimates; operands and results of a call without one.
      seconds: each call at its roofline, one after the other.
      uncosted: names of the calls without a cost estimate, whose FLOPs are not in it.
    """

    runs: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    uncosted: tuple[str, ...] = ()

    def cycles(self, clock: float | None) -> float:
        """Returns the seconds in cycles of the cores; 0 if their clock is not known."""
        return self.seconds * clock if clock else 0.0

    def notes(self, clock: float | None) -> tuple[str, ...]:
        """Returns notes on the calls for a reader."""
        if not self.runs:
            return ()
        how = "are in the cycles (+) at their roofline, which is the least they can take"
        if not clock:
            how = "are not in the cycles (+), for the clock of this kind is not known"
        found = [f"{self.runs:,.0f} runs of Pallas kernels {how}: the compiler does not price them"]
        if self.uncosted:
            found.append(
                f"{len(self.uncosted)} Pallas calls have no cost estimate (pl.CostEstimate): of "
                f"these only operands and results count: {', '.join(self.uncosted[:3])}"
            )
        return tuple(found)


def pallas_calls(module: Module, runs: Runs, chip: Chip, dtype: str) -> PallasCalls:
    """Sums the Pallas calls of `module` for which the compiler gives no cycles of its own.

    Args:
      dtype: of the products in the kernels, for the peak.
    """
    peak = chip.peak_flops(dtype)
    total = PallasCalls()
    for name, computation in module.computations.items():
        # A computation that never runs has no times, and its calls cost nothing.
        times = runs.times.get(name, 0.0)
        for instruction in computation.instructions if times else ():
            text = instruction.attributes
            if instruction.opcode != "custom-call" or TARGET not in text or _OWN_ESTIMATE in text:
                continue
            said = _cost(instruction)
            flops, moved = said if said else (0.0, _operands_and_results(computation, instruction))
            total = PallasCalls(
                total.runs + times,
                total.flops + times * flops,
                total.bytes + times * moved,
                total.seconds + times * max(flops / peak, moved / chip.hbm_bandwidth),
                total.uncosted if said else (*total.uncosted, instruction.name),
            )
    return total


def _cost(instruction: Instruction) -> tuple[float, float] | None:
    """Returns (FLOPs, bytes) that the kernel's author gave; None if they gave none."""
    found = _COST.search(instruction.attributes)
    if found is None:
        return None
    # Protobuf's JSON quotes an int64.
    fields = dict(re.findall(r'"(\w+)":"?(-?\d+)', found.group(1)))
    return float(fields.get("flops", 0)), float(fields.get("bytes_accessed", 0))


def _operands_and_results(computation: Computation, call: Instruction) -> float:
    """Returns the bytes of operands and results, once each, in place of a cost estimate."""
    operands = (computation.by_name[name].arrays for name in dict.fromkeys(call.operands))
    arrays = (*call.arrays, *(array for one in operands for array in one))
    return float(sum(array.padded_bytes for array in arrays))

"""The least time that a step can take on its devices (Williams et al. 2009, "Roofline")."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds that each resource of a device is busy in a step, at its full rate; None if unknown.

    Attributes:
      compute: the matrix units.
      memory: the main memory.
      network: the links to other devices.
    """

    compute: float | None
    memory: float | None
    network: float | None

    def _known(self) -> dict[str, float]:
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}

    @property
    def step_seconds(self) -> float | None:
        """Seconds if all resources work at the same time: no step is faster."""
        # Overlap is never perfect: real steps lie between this and `serial_seconds`, or above.
        return max(self._known().values(), default=None)

    @property
    def serial_seconds(self) -> float | None:
        """Seconds if each resource waits for the others, at its full rate."""
        # No known resource gives 0, which is no time.
        return sum(self._known().values()) or None

    @property
    def bound_by(self) -> str | None:
        """The resource that takes longest."""
        known = self._known()
        return max(known, key=known.__getitem__, default=None)


@dataclasses.dataclass(frozen=True)
class Cost:
    """The cost of a whole run, if its steps take so long.

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


def cost(
    step_seconds: float,
    *,
    steps: int,
    batch_size: int,
    chips: float,
    model_flops: float,
    peak_flops: float | None,
    price_per_chip_hour: float | None,
) -> Cost:
    """Returns the cost of a run without evaluations, checkpoints and waiting for data.

    Args:
      model_flops: of a step on all devices.
      peak_flops: of all devices together.
    """
    # Chips are paid for while they wait, too: evaluations and checkpoints come on top.
    hours = steps * step_seconds / 3600
    return Cost(
        step_seconds=step_seconds,
        examples_per_second=batch_size / step_seconds,
        mfu=model_flops / step_seconds / peak_flops if peak_flops else None,
        days=hours / 24,
        chip_hours=hours * chips,
        price=None if price_per_chip_hour is None else hours * chips * price_per_chip_hour,
    )

"""The weight of a loss in a sum, which may change during a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from vlp_jax import config as config_lib

Duration = Mapping[str, Any]  # a section of a config, such as {"percent": 80}
StepsOf = Callable[[Duration, str], int]  # (duration, its key for errors) -> steps


@dataclasses.dataclass(frozen=True)
class Weight:
    """The factor on a loss at each step.

    Attributes:
      value: the factor after the ramp.
      begin: the first step with a factor above 0.
      ramp: steps of a linear rise; the last of them has the factor `value`. 0 for no ramp.
      end: the first step with the factor 0 again; None for no end.
    """

    value: float = 1.0
    begin: int = 0
    ramp: int = 0
    end: int | None = None

    @classmethod
    def of(cls, given: float | Mapping[str, Any], steps_of: StepsOf | None, where: str) -> Weight:
        """Makes the weight from a config: a number, or `value`, `begin`, `ramp` and `end`.

        Args:
          given: `begin`, `ramp` and `end` are durations, such as {"percent": 80}.
          steps_of: converts a duration to steps. None, where nothing is trained, makes the weight
            `value` at every step.
          where: its key, for errors.

        Raises:
          UserError: an unknown key, a value that is not positive, or a duration that does not fit.
        """

        def steps(key: str, duration: Duration | None) -> int | None:
            if steps_of is None or duration is None:
                return None
            return steps_of(duration, f"{where}.{key}")

        section = {"value": given} if isinstance(given, int | float) else given
        return config_lib.build(_make_weight, section, where, steps=steps)

    @property
    def changes(self) -> bool:
        """Whether the factor differs between steps."""
        return bool(self.begin or self.ramp or self.end is not None)

    def is_on(self, step: int) -> bool:
        """Whether the factor is above 0 at `step`."""
        return self.begin <= step and (self.end is None or step < self.end)

    def at(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """Returns the factor at a step at which `is_on` is True."""
        if not self.ramp:
            return self.value
        return self.value * jnp.clip((step - self.begin + 1) / self.ramp, 0, 1)

    def __mul__(self, other: Weight) -> Weight:
        """Multiplies a sum's weight by a part's; ValueError if both change during the run."""
        if self.changes and other.changes:
            raise ValueError("a sum and a part of it both have a weight that changes: give one")
        changing = other if other.changes else self
        return dataclasses.replace(changing, value=self.value * other.value)


def _make_weight(
    value: float = 1.0,
    begin: Duration | None = None,
    ramp: Duration | None = None,
    end: Duration | None = None,
    *,
    steps: Callable[[str, Duration | None], int | None],
) -> Weight:
    if value <= 0:
        raise ValueError(f"a weight must be positive, not {value}")
    first, last = steps("begin", begin) or 0, steps("end", end)
    if last is not None and last <= first:
        raise ValueError(f"it ends at step {last:,}, and begins at step {first:,}")
    return Weight(float(value), first, steps("ramp", ramp) or 0, last)

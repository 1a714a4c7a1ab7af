"""The exponential moving average of the parameters, for evaluation and as a teacher for losses."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from vlp_jax.errors import UserError
from vlp_jax.training import param_groups
from vlp_jax.training.when import Units


@dataclasses.dataclass(frozen=True)
class Average:
    """Describes which parameters are averaged, and how slowly the average follows them.

    Attributes:
      decay: share of itself that the average keeps at a step; 0 for no average.
      final_decay: the decay rises to this value by half a cosine (Grill et al. 2020, "BYOL", 3.3);
        None keeps it constant.
      total_steps: steps over which the decay rises.
      patterns: regular expressions. A parameter is averaged if its whole path matches one of them.
    """

    decay: float = 0.0
    final_decay: float | None = None
    total_steps: int = 1
    patterns: tuple[str, ...] = (".*",)

    @classmethod
    def of(cls, config: Mapping[str, Any], units: Units) -> Average:
        """Reads the average from `config.optimizer`.

        Raises:
          UserError: a number out of range, or a pattern that is no regular expression.
        """
        decay, final = config["ema_decay"], config["ema_final_decay"]
        if not 0 <= decay < 1:
            raise UserError(f"config.optimizer.ema_decay must be in [0, 1), not {decay}")
        if final is not None and not decay <= final <= 1:
            raise UserError(
                f"config.optimizer.ema_final_decay must be in [ema_decay, 1], not {final}"
            )
        if final is not None and not decay:
            raise UserError("config.optimizer.ema_final_decay needs an ema_decay above 0")
        param_groups.check_patterns(config["ema_of"], "config.optimizer.ema_of")
        return cls(decay, final, units.total_steps or 1, tuple(config["ema_of"]))

    def check(self, params: Any) -> None:
        """Raises UserError if a pattern matches no parameter."""
        paths = param_groups.flatten(params) if self.decay else {}
        for pattern in self.patterns if paths else ():
            if not any(param_groups.is_frozen(path, (pattern,)) for path in paths):
                raise UserError(f"config.optimizer.ema_of: {pattern!r} is the path of no parameter")

    def chosen(self, tree: Any) -> Any:
        """Selects the averaged leaves of a tree like the parameters; empty without an average."""
        return param_groups.split(tree, self.patterns)[1] if self.decay else {}

    def init(self, params: Any) -> Any:
        """Returns the average before the first step: a copy of the averaged parameters."""
        # A copy, since the step donates both and a buffer cannot be donated twice.
        return jax.tree.map(jnp.copy, self.chosen(params))

    def decay_at(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """Returns the decay at `step`."""
        if self.final_decay is None:
            return self.decay
        done = jnp.clip(step / self.total_steps, 0, 1)
        return self.final_decay - (self.final_decay - self.decay) * (1 + jnp.cos(jnp.pi * done)) / 2

    def __call__(self, ema: Any, trained: Any, step: Int[Array, ""] | int) -> Any:
        """Returns the average after a step.

        Args:
          ema: the average before the step, a flat or nested part of the parameters' tree.
          trained: the trainable parameters after the step. Averages of other parameters, which are
            frozen, do not change.
        """
        if not self.decay:
            return ema
        new, flat = param_groups.flatten(trained), param_groups.flatten(ema)
        moved = {path: new[path] for path in flat.keys() & new.keys()}
        before = {path: flat[path] for path in moved}
        # optax takes the share of the new value, and not of the old one.
        after = optax.incremental_update(moved, before, 1 - self.decay_at(step))
        return param_groups.unflatten({**flat, **after})


NO_AVERAGE = Average()

"""The exponential moving average of the parameters: what is evaluated, and a teacher for losses."""

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
      final_decay: to which the decay rises by half a cosine (Grill et al. 2020, "BYOL", 3.3); None:
        it stays.
      total_steps: over which it rises.
      patterns: regular expressions; a parameter is averaged if one is its whole path.
    """

    decay: float = 0.0
    final_decay: float | None = None
    total_steps: int = 1
    patterns: tuple[str, ...] = (".*",)

    @classmethod
    def of(cls, config: Mapping[str, Any], units: Units) -> Average:
        """The average that `config.optimizer` describes.

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
        """Raises UserError if a pattern is no parameter's path."""
        paths = param_groups.flatten(params) if self.decay else {}
        for pattern in self.patterns if paths else ():
            if not any(param_groups.is_frozen(path, (pattern,)) for path in paths):
                raise UserError(f"config.optimizer.ema_of: {pattern!r} is the path of no parameter")

    def chosen(self, tree: Any) -> Any:
        """Selects the averaged leaves of a tree like the parameters; empty without an average."""
        return param_groups.split(tree, self.patterns)[1] if self.decay else {}

    def init(self, params: Any) -> Any:
        """The average before the first step."""
        return jax.tree.map(jnp.copy, self.chosen(params))

    def decay_at(self, step: Int[Array, ""] | int) -> Float[Array, ""] | float:
        """The decay of a step."""
        if self.final_decay is None:
            return self.decay
        done = jnp.clip(step / self.total_steps, 0, 1)
        return self.final_decay - (self.final_decay - self.decay) * (1 + jnp.cos(jnp.pi * done)) / 2

    def __call__(self, ema: Any, trained: Any, step: Int[Array, ""] | int) -> Any:
        """The average after a step that left the parameters `trained`, of which it may hold a part.

        What it holds of others, which are frozen, stays.
        """
        if not self.decay:
            return ema
        new, flat = param_groups.flatten(trained), param_groups.flatten(ema)
        moved = {path: new[path] for path in flat.keys() & new.keys()}
        before = {path: flat[path] for path in moved}
        after = optax.incremental_update(moved, before, 1 - self.decay_at(step))
        return param_groups.unflatten({**flat, **after})


NO_AVERAGE = Average()

"""Rules of a step beside its update: the average of the parameters, and the guard that skips."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int
from ml_collections import ConfigDict

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
        """Reads the average from `config.optimizer`; UserError for a bad number or pattern."""
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
        """Returns the average after a step; averages of what is not in `trained` do not change."""
        if not self.decay:
            return ema
        new, flat = param_groups.flatten(trained), param_groups.flatten(ema)
        moved = {path: new[path] for path in flat.keys() & new.keys()}
        before = {path: flat[path] for path in moved}
        # optax takes the share of the new value, and not of the old one.
        after = optax.incremental_update(moved, before, 1 - self.decay_at(step))
        return param_groups.unflatten({**flat, **after})


@dataclasses.dataclass(frozen=True)
class Guard:
    """Decides on the device, before the update, whether a step may change the state.

    Attributes:
      spike_deviations: a loss this many standard deviations above the running mean is a spike, and
        its step is skipped. 0 turns the rule off.
      spike_window: steps over which the running mean and variance decay. The first `spike_window`
        losses are never spikes.
    """

    spike_deviations: float = 0.0
    spike_window: int = 200

    @classmethod
    def of(cls, config: ConfigDict) -> Guard:
        """Reads the guard from `config.guard`; UserError for a number out of its range."""
        if config.spike_deviations < 0:
            raise UserError("config.guard.spike_deviations must be >= 0 (0 turns the rule off)")
        if config.spike_window < 2:
            raise UserError("config.guard.spike_window must be at least 2 steps")
        if config.max_skipped < 1:
            raise UserError("config.guard.max_skipped must be at least 1")
        return cls(float(config.spike_deviations), int(config.spike_window))

    def init(self) -> dict[str, Array]:
        """Returns the loss statistics before the first step; {} if the spike rule is off."""
        if not self.spike_deviations:
            return {}
        return {"count": jnp.int32(0), "mean": jnp.float32(0), "variance": jnp.float32(0)}

    def __call__(
        self, loss_stats: dict[str, Array], loss: Float[Array, ""], grad_norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], dict[str, Array]]:
        """Returns whether to apply the step, and the loss statistics after it.

        A skipped step is left out of them. Running mean and variance follow West (1979) with a
        decay of 1 / min(n, window).
        """
        # The norm is finite only if each gradient is: one number checks all of them.
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if not self.spike_deviations:
            return finite, loss_stats
        count, mean, variance = loss_stats["count"], loss_stats["mean"], loss_stats["variance"]
        warmed_up = count >= self.spike_window
        # A NaN compares as False: such a loss is no spike, and `finite` refuses it.
        spike = warmed_up & (loss > mean + self.spike_deviations * jnp.sqrt(variance))
        apply = finite & ~spike
        # 1 / n until the window is full gives the plain mean of the first losses, without bias.
        rate = 1 / jnp.minimum(count + 1, self.spike_window).astype(jnp.float32)
        difference = loss.astype(jnp.float32) - mean
        after = {
            # Beyond the window the count says no more, and without a bound int32 would overflow one
            # day.
            "count": jnp.minimum(count + 1, self.spike_window),
            "mean": mean + rate * difference,
            "variance": (1 - rate) * (variance + rate * difference**2),
        }
        return apply, choose(apply, after, loss_stats)


def choose(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns the tree `new` if the condition holds, else `old`, bit for bit."""
    # `a is b` for what a step never changes (frozen parameters): no select, and no copy.
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)

"""Decides which steps are skipped: loss or gradient is not finite, or the loss has a spike."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from vlp_jax.errors import UserError


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
        """Reads the guard from `config.guard`.

        Raises:
          UserError: a number is out of its range.
        """
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

        A skipped step is left out of the statistics. Running mean and variance follow West (1979)
        with a decay of 1 / min(n, window).
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


NO_SPIKE_RULE = Guard()  # only steps that are not finite are skipped


def choose(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """Returns the tree `new` if the condition holds, else `old`, bit for bit."""
    # `a is b` for what a step never changes (frozen parameters): no select, and no copy.
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)

"""Steps that change nothing: where loss or gradient is no number, or the loss leaps."""

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
      spike_deviations: a loss that is this many standard deviations above the running mean of the
        losses is a spike, whose step is skipped; 0 for no such rule.
      spike_window: steps over which that mean and the deviation decay, and which have to be seen
        before anything is a spike.
    """

    spike_deviations: float = 0.0
    spike_window: int = 200

    @classmethod
    def of(cls, config: ConfigDict) -> Guard:
        """That of `config.guard`.

        Raises:
          UserError: a number that makes no sense.
        """
        if config.spike_deviations < 0:
            raise UserError("config.guard.spike_deviations is at least 0, which is: no such rule")
        if config.spike_window < 2:
            raise UserError("config.guard.spike_window is at least 2 steps")
        if config.max_skipped < 1:
            raise UserError("config.guard.max_skipped is at least 1")
        return cls(float(config.spike_deviations), int(config.spike_window))

    def init(self) -> dict[str, Array]:
        """What the rule about spikes remembers; empty without it."""
        if not self.spike_deviations:
            return {}
        return {"count": jnp.int32(0), "mean": jnp.float32(0), "variance": jnp.float32(0)}

    def __call__(
        self, memory: dict[str, Array], loss: Float[Array, ""], grad_norm: Float[Array, ""]
    ) -> tuple[Bool[Array, ""], dict[str, Array]]:
        """Whether the step may go ahead, and the memory after it, which skipped steps are not in.

        The running mean and variance are West's (1979) with a decay of 1 / min(n, window).
        """
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        if not self.spike_deviations:
            return finite, memory
        count, mean, variance = memory["count"], memory["mean"], memory["variance"]
        known = count >= self.spike_window
        spike = known & (loss > mean + self.spike_deviations * jnp.sqrt(variance))
        ahead = finite & ~spike
        rate = 1 / jnp.minimum(count + 1, self.spike_window).astype(jnp.float32)
        difference = loss.astype(jnp.float32) - mean
        after = {
            "count": jnp.minimum(count + 1, self.spike_window),
            "mean": mean + rate * difference,
            "variance": (1 - rate) * (variance + rate * difference**2),
        }
        return ahead, choose(ahead, after, memory)


NO_SPIKE_RULE = Guard()  # only steps that are not finite are skipped


def choose(condition: Bool[Array, ""], new: Any, old: Any) -> Any:
    """The tree `new` where the condition holds, else `old`, bit for bit."""
    return jax.tree.map(lambda a, b: a if a is b else jnp.where(condition, a, b), new, old)

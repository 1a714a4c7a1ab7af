"""Bytes of a training state on a device, from its shapes and shardings."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from vlp_jax.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Share:
    """Bytes of a tree of arrays: all of it once, and the largest part that a device holds."""

    total: int
    device: int

    @property
    def shards(self) -> float:
        """Number of devices that the tree is spread over; 1 if each holds all of it."""
        return self.total / self.device if self.device else 1.0


def share(tree: Any) -> Share:
    """Measures the `jax.ShapeDtypeStruct`s of `tree`, which have shardings."""
    total = device = 0
    for leaf in jax.tree.leaves(tree):
        total += leaf.dtype.itemsize * math.prod(leaf.shape)
        # `shard_shape` refuses uneven shards, so every device holds as much.
        device += leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))
    return Share(total, device)


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """The parts of a training state; averages and the objective's own are with `optimizer`."""

    params: Share
    optimizer: Share

    @property
    def device(self) -> int:
        """Bytes on a device, all parts together."""
        return self.params.device + self.optimizer.device

    @property
    def total(self) -> int:
        """Bytes of the whole state once."""
        return self.params.total + self.optimizer.total


def state_bytes(abstract: TrainState) -> StateBytes:
    """Measures an abstract state."""
    # Whatever a restart needs besides parameters is charged to the optimizer.
    others = (abstract.step, abstract.opt_state, abstract.ema, abstract.objective)
    return StateBytes(share(abstract.params), share(others))

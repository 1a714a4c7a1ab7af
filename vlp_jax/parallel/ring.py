"""Passes blocks of data around the ring of devices that share a batch: each device sees each block.

device      0   1   2   3
round 0     a   b   c   d      every device works on its own block
round 1     d   a   b   c      `ppermute` moves each block to the next device
round 2     c   d   a   b
round 3     b   c   d   a      then the sums of each block are one shift away from home
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Int

from vlp_jax.parallel.mesh import BATCH_AXES, batch_shards

# Shardings of arrays: split over the batch axes, or replicated on every device.
SPREAD, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()

# (owner of the block, block, local state) -> (contribution to the block's sum, new local state)
Visit = Callable[[Int[Array, ""], Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along the flattened `BATCH_AXES` of a mesh, each with its part of a batch.

    Devices along other axes of the mesh repeat the same work. Call the methods, except `run` and
    `devices`, inside a function that `run` calls.
    """

    mesh: Mesh | AbstractMesh

    @property
    def devices(self) -> int:
        """The number of devices that share a batch."""
        return batch_shards(self.mesh)

    def run(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """Turns `function(ring, *local arrays)` into a function of global arrays, by `shard_map`.

        Args:
          in_specs, out_specs: `SPREAD` or `WHOLE` for each argument and result.
        """
        function = functools.partial(function, self)
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def here(self) -> Int[Array, ""]:
        """The position of this device in the ring."""
        return jax.lax.axis_index(BATCH_AXES)

    def shift(self, tree: Any) -> Any:
        """Sends each array to the next device, and returns the array of the previous device."""
        pairs = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, pairs), tree)

    def sum(self, x: Array) -> Array:
        """Sums `x` over the ring; every device gets the sum."""
        return jax.lax.psum(x, BATCH_AXES)

    def around(
        self,
        visit: Visit,
        combine: Callable[[Any, Any], Any],
        block: Any,
        block_sum: Any,
        local: Any,
    ) -> tuple[Any, Any]:
        """Sends each device's `block` to every device, beginning with the device itself.

        Args:
          visit: called on each device for each block: `visit(owner, block, local)` returns the
            device's contribution to the block's sum, and the device's new local state.
          combine: adds a contribution: `combine(block_sum, contribution)`.
          block: data that travels and does not change.
          block_sum: the sum that travels with the block; its value before the first visit.
          local: state that stays on the device; its value before the first visit.

        Returns:
          The sum of the device's own block over all visits, and the final local state.
        """
        here = self.here()

        def receive(hop: Any, block: Any, block_sum: Any, local: Any) -> tuple[Any, Any]:
            # The sum arrives one round after its block. The visit does not read it, so this move
            # overlaps with the visit.
            block_sum = self.shift(block_sum)
            contribution, local = visit((here - hop) % self.devices, block, local)
            return combine(block_sum, contribution), local

        def move(hop: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            block, block_sum, local = carry
            # The visit reads the old block, so sending it on overlaps with the visit as well. A
            # device holds two blocks at most: the old one and the one that arrives.
            return self.shift(block), *receive(hop, block, block_sum, local)

        # The last round stands outside the loop, since its blocks are not sent on.
        last = self.devices - 1
        block, block_sum, local = jax.lax.fori_loop(0, last, move, (block, block_sum, local))
        block_sum, local = receive(last, block, block_sum, local)
        # After `devices - 1` rounds each sum is one device short of its owner.
        return self.shift(block_sum), local

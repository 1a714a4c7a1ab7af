"""A ring of the devices that share a batch: blocks of data visit all of them, one after another."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec
from jaxtyping import Array, Int

from vlp_jax.parallel.mesh import BATCH_AXES

# How arrays lie: in parts over the batch axes, or whole on every device.
SPREAD, WHOLE = PartitionSpec(BATCH_AXES), PartitionSpec()

# (owner of the guest, guest, host) -> (gift to the guest, host)
Visit = Callable[[Int[Array, ""], Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Ring:
    """The devices along the flattened `BATCH_AXES` of a mesh, each with its part of a batch.

    Along other axes of the mesh, devices do the same work. All methods but `run` and `devices`
    belong inside a function that `run` calls.
    """

    mesh: Mesh | AbstractMesh

    @property
    def devices(self) -> int:
        """How many parts a batch has."""
        return math.prod(self.mesh.shape[axis] for axis in BATCH_AXES)

    def run(
        self, function: Callable[..., Any], in_specs: Any, out_specs: Any
    ) -> Callable[..., Any]:
        """`function(ring, parts of arrays on a device)` as a function of whole arrays.

        Args:
          in_specs, out_specs: `SPREAD` or `WHOLE` for each argument and result.
        """
        function = functools.partial(function, self)
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs)

    def here(self) -> Int[Array, ""]:
        """The position of this device in the ring."""
        return jax.lax.axis_index(BATCH_AXES)

    def shift(self, tree: Any) -> Any:
        """Gives each array to the next device and takes that of the one before."""
        pairs = [(i, (i + 1) % self.devices) for i in range(self.devices)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, BATCH_AXES, pairs), tree)

    def sum(self, x: Array) -> Array:
        """The sum of all devices' `x`, on each of them."""
        return jax.lax.psum(x, BATCH_AXES)

    def around(
        self,
        visit: Visit,
        pack: Callable[[Any, Any], Any],
        guest: Any,
        luggage: Any,
        host: Any,
    ) -> tuple[Any, Any]:
        """Sends each device's `guest` to every device, its own first.

        There `visit(owner of the guest, guest, host)` gives a gift and the host's new state, and
        the guest's luggage becomes `pack(luggage, gift)`. Returns the luggage, home again, and the
        host.

        A round begins with both moves, and its visit needs neither: the next guest comes for the
        next visit, and the luggage follows its guest one round later. So the compiler can let the
        moves overlap with the visit. No more than two guests are on a device at once.
        """
        here = self.here()

        def receive(hop: Any, guest: Any, luggage: Any, host: Any) -> tuple[Any, Any]:
            luggage = self.shift(luggage)
            gift, host = visit((here - hop) % self.devices, guest, host)
            return pack(luggage, gift), host

        def move(hop: Any, carry: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
            guest, luggage, host = carry
            return self.shift(guest), *receive(hop, guest, luggage, host)

        # The guests of the last round go nowhere, so that it stands outside the loop.
        last = self.devices - 1
        guest, luggage, host = jax.lax.fori_loop(0, last, move, (guest, luggage, host))
        luggage, host = receive(last, guest, luggage, host)
        return self.shift(luggage), host

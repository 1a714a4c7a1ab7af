"""Makes devices of absent TPUs, for ahead-of-time compilation: they compile programs but run none.

This needs the package libtpu, and no TPU. libtpu makes devices of nearly any shape, even of shapes
that nobody can rent. The tables here list the slices that exist.
"""

from __future__ import annotations

import itertools
import math
import os
from typing import Any

import jax
from jax.experimental import topologies

from vlp_jax.errors import UserError

# Chips along each axis of a slice, from the pages v5e, v6e, v4, v5p and tpu7x of
# https://docs.cloud.google.com/tpu/docs. v5e and v6e are flat grids of at most 256 chips.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_SMALL = ("2x2x1", "2x2x2", "2x2x4", "2x4x4")
# Slices of 64 chips and more are composed of cubes of 4x4x4: (longest side, most chips).
_CUBES = {"v4": (16, 4096), "v5p": (24, 6144), "tpu7x": (24, 6144)}
# On v4, Cloud TPU shows the two cores of a chip as one device; libtpu's default is two devices.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# Chips of a host, where it does not have the usual 2x2.
_HOSTS = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}


def known_topologies() -> tuple[str, ...]:
    """Lists the slices that exist, such as "v5e:16x16". On tpu7x a chip is two devices."""
    flat = [f"{kind}:{shape}" for kind in ("v5e", "v6e") for shape in _FLAT]
    deep = [
        f"{kind}:{shape}"
        for kind, (longest, most) in _CUBES.items()
        for shape in (*_SMALL, *_shapes_of_cubes(longest, most))
    ]
    return (*flat, *deep)


def _shapes_of_cubes(longest: int, most: int) -> list[str]:
    sides = range(4, longest + 1, 4)
    shapes = itertools.combinations_with_replacement(sides, 3)
    return ["x".join(map(str, s)) for s in sorted(shapes, key=math.prod) if math.prod(s) <= most]


def tpu_devices(name: str, slices: int = 1) -> list[Any]:
    """Makes the devices of `slices` TPU slices of the topology `name`. No TPU is needed.

    Devices of several slices have a `slice_index`.

    Raises:
      UserError: there is no such topology, or libtpu is missing or refuses it.
    """
    kind, _, shape = name.partition(":")
    known = known_topologies()
    if name not in known:
        of_kind = ", ".join(one for one in known if one.startswith(f"{kind}:"))
        told = f"those of {kind}: {of_kind}" if of_kind else f"some are {largest_topologies()}"
        raise UserError(f"topology {name!r} does not exist; {told}")
    if slices < 1:
        raise UserError(f"a TPU has at least one slice, not {slices}")
    # Keep libtpu from asking for a TPU VM's metadata server, and from taking the lock that guards
    # real TPUs.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Variables of a TPU VM. libtpu complains if they are missing, but their values do not restrict
    # the topology.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    options: dict[str, Any] = dict(_OPTIONS.get(kind, {}))
    if shape in _HOSTS:
        options["chips_per_host_bounds"] = _HOSTS[shape]
    if slices > 1:
        options["num_slices"] = slices
    try:
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {name}: {reason}; this needs the package libtpu (pip install libtpu)"
        ) from error
    return list(topology.devices)


def largest_topologies() -> str:
    """Lists the largest slice of each kind, for an error."""
    # The last of each kind is the largest.
    return ", ".join({name.partition(":")[0]: name for name in known_topologies()}.values())

"""TPUs that need not be here: their devices take `jit(...).lower(...).compile()`, but run nothing.

This needs the package libtpu, and no TPU. libtpu makes devices of nearly any shape, also of such as
nobody can rent; the table here is of those that exist.
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
# Slices of 64 chips and more are put together from cubes of 4x4x4: longest side, and most chips.
_CUBES = {"v4": (16, 4096), "v5p": (24, 6144), "tpu7x": (24, 6144)}
# On v4 the two cores of a chip are one device, as Cloud TPU has it; libtpu's default is two.
_OPTIONS = {"v4": {"chip_config_name": "megacore"}}
# What a host holds of the slices that are smaller than its usual 2x2 chips, or one host with 8.
_HOSTS = {"1x1": (1, 1, 1), "2x4": (2, 4, 1)}


def known_topologies() -> tuple[str, ...]:
    """The slices that exist: "v5e:16x16", "v5p:8x8x8" and so on. On tpu7x a chip is two devices."""
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
    """The devices of `slices` TPU slices of the topology `name`, which need not be here.

    Devices of several slices have a `slice_index`.

    Raises:
      UserError: there is no such topology, or libtpu is missing or refuses it.
    """
    _check_known(name)
    if slices < 1:
        raise UserError(f"a TPU has at least one slice, not {slices}")
    # Not to look for a TPU VM's metadata server, and not to wait for, or to keep from others, a
    # lock on TPUs that are not used here.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # What a TPU VM has; libtpu complains of its absence, and makes any topology with it.
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    kind, _, shape = name.partition(":")
    options: dict[str, Any] = dict(_OPTIONS.get(kind, {}))
    if shape in _HOSTS:
        options["chips_per_host_bounds"] = _HOSTS[shape]
    if slices > 1:
        options["num_slices"] = slices
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=name, **options)
    except (RuntimeError, ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"topology {name}: {reason}; this needs the package libtpu (pip install libtpu)"
        ) from error
    return list(found.devices)


def _check_known(name: str) -> None:
    known = known_topologies()
    if name in known:
        return
    kinds = dict.fromkeys(topology.partition(":")[0] for topology in known)
    kind = name.partition(":")[0]
    listed = [topology for topology in known if topology.startswith(f"{kind}:")]
    if not listed:
        examples = ", ".join(next(t for t in known[::-1] if t.startswith(f"{k}:")) for k in kinds)
        raise UserError(
            f"topology {name!r} does not exist: it is KIND:SHAPE, KIND one of {', '.join(kinds)}; "
            f"the largest are {examples}"
        )
    raise UserError(f"topology {name!r} does not exist; those of {kind}: {', '.join(listed)}")

"""The one table from logical axis names to mesh axes, and the shardings it gives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.parallel.mesh import BATCH_AXES

# A logical name that is not here is not sharded by name, but see `leaf_sharding`.
# `vlp_jax.models.layers` explains the names.
AXIS_RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("act_mlp", "tensor"),
    ("act_heads", "tensor"),
)
# The axis that takes a part of every parameter, and the dimension that it never takes: a scan over
# sharded layers would gather them all before the first one runs.
EVERYWHERE, NEVER = "fsdp", "layers"


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes the logical names of activations mean axes of `mesh` in what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        yield


def is_boxed(leaf: Any) -> bool:
    """Whether `leaf` is a parameter with the logical names of its dimensions."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def names_of(leaf: Any) -> tuple[str | None, ...]:
    """The logical name of each dimension of a parameter, None where it has none."""
    names = leaf.names if is_boxed(leaf) else ()
    return (*names, *(None,) * (nn.unbox(leaf).ndim - len(names)))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter of an abstract tree with logical names.

    Args:
      boxed: tree of `jax.ShapeDtypeStruct`, bare or in `nn.LogicallyPartitioned` boxes.
    """
    return jax.tree.map(
        lambda leaf: leaf_sharding(names_of(leaf), nn.unbox(leaf).shape, mesh),
        boxed,
        is_leaf=is_boxed,
    )


def leaf_sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Where an array of the state lies: by its names, and over `fsdp` in any case.

    First each name takes the mesh axes that `AXIS_RULES` give it. A mesh axis whose size does not
    divide the dimension is left out, and the array lies whole along it: a bias of 3 heads is not
    worth an error, and `python -m tools.show_sharding` shows it.

    Then, if no dimension has taken `fsdp`, the largest one does that it divides and that no other
    axis took, `layers` excepted; of equal ones the first. If there is none, it joins the axes of
    the largest dimension that it divides together with these. So biases, scales of norms and the
    like do not lie whole on every device, which on hundreds of devices they would more than fill.
    What is left whole is scalars, and arrays that `fsdp` divides nowhere.
    """
    rules = dict(AXIS_RULES)
    taken = [_axes(rules.get(name, ()), dim, mesh) for name, dim in zip(names, shape, strict=True)]
    if mesh.shape[EVERYWHERE] > 1 and not any(EVERYWHERE in axes for axes in taken):
        joined = [(*axes, EVERYWHERE) for axes in taken]
        able = [
            index
            for index, (name, dim) in enumerate(zip(names, shape, strict=True))
            if name != NEVER and _axes(joined[index], dim, mesh)
        ]
        if able:
            best = max(able, key=lambda index: (not taken[index], shape[index], -index))
            taken[best] = joined[best]
    spec = (axes[0] if len(axes) == 1 else axes or None for axes in taken)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes(axes: str | tuple[str, ...], dim: int, mesh: Mesh) -> tuple[str, ...]:
    """Those of the mesh axes that there are several devices along, if they divide `dim`."""
    axes = (axes,) if isinstance(axes, str) else axes
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return axes if dim % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()

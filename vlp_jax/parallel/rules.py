"""The one table from logical axis names to mesh axes, and the shardings that follow from it."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.parallel.mesh import BATCH_AXES

# A dimension whose name is not here is not sharded by name, but see `leaf_sharding`.
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
# EVERYWHERE is the mesh axis that shards every parameter. NEVER is the dimension that it must not
# shard: a scan over sharded layers would gather all of them before the first layer runs.
EVERYWHERE, NEVER = "fsdp", "layers"
# The mesh axes that shard a state. `replica` holds copies.
SHARDING_AXES = ("fsdp", "tensor")


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Binds the logical names of activations to the axes of `mesh`, for code traced within."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        yield


def is_boxed(leaf: Any) -> bool:
    """Whether `leaf` is a parameter in a box that names its dimensions."""
    return isinstance(leaf, nn.LogicallyPartitioned)


def names_of(leaf: Any) -> tuple[str | None, ...]:
    """Returns the logical name of each dimension of a parameter; None for an unnamed dimension."""
    names = leaf.names if is_boxed(leaf) else ()
    return (*names, *(None,) * (nn.unbox(leaf).ndim - len(names)))


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for each parameter of an abstract tree with logical names.

    Args:
      boxed: tree of `jax.ShapeDtypeStruct`, bare or in `nn.LogicallyPartitioned` boxes.
    """
    return jax.tree.map(
        lambda leaf: leaf_sharding(names_of(leaf), nn.unbox(leaf).shape, mesh),
        boxed,
        is_leaf=is_boxed,
    )


def leaf_sharding(names: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> NamedSharding:
    """Chooses the sharding of an array of the train state: by its names, and over `fsdp` always.

    1. Each dimension takes the mesh axes that `AXIS_RULES` list for its name. If their size does
       not divide the dimension, the array is replicated along them: a bias of 3 heads is not worth
       an error. `python -m tools.show_sharding` lists such arrays.
    2. If no dimension has taken `fsdp`, the largest dimension takes it that it divides and that no
       other axis has taken. `layers` is excepted; of equal dimensions the first counts.
    3. If there is no such dimension, `fsdp` joins the axes of the largest dimension that it divides
       together with them.

    Step 2 shards biases and scales of norms as well. On hundreds of devices, replicas of them would
    take more memory than all shards of the kernels. Only scalars, and arrays that `fsdp` divides
    nowhere, stay replicated.
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
            # A free dimension first (rule 2), then a taken one (rule 3).
            best = max(able, key=lambda index: (not taken[index], shape[index], -index))
            taken[best] = joined[best]
    spec = (axes[0] if len(axes) == 1 else axes or None for axes in taken)
    return NamedSharding(mesh, PartitionSpec(*spec))


def _axes(axes: str | tuple[str, ...], dim: int, mesh: Mesh) -> tuple[str, ...]:
    """The mesh axes larger than 1, or () if their product does not divide `dim`."""
    axes = (axes,) if isinstance(axes, str) else axes
    axes = tuple(axis for axis in axes if mesh.shape[axis] > 1)
    return axes if dim % math.prod(mesh.shape[axis] for axis in axes) == 0 else ()


@dataclasses.dataclass(frozen=True)
class Spread:
    """Bytes of some arrays, in total and on one device.

    Attributes:
      total: bytes without copies.
      per_device: bytes of the shards on one device.
      ratio: `per_device` relative to an even share, `total` / (fsdp * tensor). 1.0 is ideal.
    """

    total: int
    per_device: int
    ratio: float


def shard_bytes(leaf: Any) -> int:
    """Returns the bytes of a shard of an array, or of an abstract array with a sharding."""
    # `shard_shape` refuses uneven shards, so every device holds as much.
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def spread(tree: Any, mesh: Mesh) -> Spread:
    """Measures a tree of arrays, or of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    total = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves)
    local = sum(map(shard_bytes, leaves))
    parts = math.prod(mesh.shape[axis] for axis in SHARDING_AXES)
    return Spread(total, local, local * parts / total if total else 1.0)

"""The one table from logical axis names to mesh axes, and the shardings it gives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vlp_jax.parallel.mesh import BATCH_AXES

# A logical name that is not here is not sharded. `vlp_jax.models.layers` explains the names.
AXIS_RULES: tuple[tuple[str, str | tuple[str, ...]], ...] = (
    ("batch", BATCH_AXES),
    ("embed", "fsdp"),
    ("mlp", "tensor"),
    ("heads", "tensor"),
    ("vocab", "tensor"),
    ("act_mlp", "tensor"),
    ("act_heads", "tensor"),
)


@contextlib.contextmanager
def use_mesh(mesh: Mesh) -> Iterator[None]:
    """Makes the logical names of activations mean axes of `mesh` in what is traced inside."""
    with jax.set_mesh(mesh), nn.logical_axis_rules(AXIS_RULES):
        yield


def param_shardings(boxed: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each parameter of an abstract tree with logical names.

    A mesh axis whose size does not divide the dimension is left out for that parameter, which then
    lies whole along it: a bias of 3 heads is not worth an error, and `sharding_table` shows it.

    Args:
      boxed: tree of `jax.ShapeDtypeStruct`, bare or in `nn.LogicallyPartitioned` boxes.
    """
    rules = dict(AXIS_RULES)

    def sharding(leaf: Any) -> NamedSharding:
        names = leaf.names if isinstance(leaf, nn.LogicallyPartitioned) else ()
        shape = nn.unbox(leaf).shape
        return NamedSharding(mesh, PartitionSpec(*_axes(names, shape, rules, mesh)))

    return jax.tree.map(sharding, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))


def _axes(names: tuple, shape: tuple[int, ...], rules: dict, mesh: Mesh) -> Iterator[Any]:
    for name, dim in zip(names, shape, strict=False):
        axes = rules.get(name, ())
        axes = (axes,) if isinstance(axes, str) else axes
        divides = axes and dim % math.prod(mesh.shape[axis] for axis in axes) == 0
        yield (axes[0] if len(axes) == 1 else axes) if divides else None


def sharding_table(params: Any, shardings: Any) -> str:
    """A line per parameter: path, shape, spec, bytes on a device; then the totals."""
    rows, total, local = [], 0, 0
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), sharding in zip(leaves, jax.tree.leaves(shardings), strict=True):
        bytes_each = leaf.dtype.itemsize * math.prod(sharding.shard_shape(leaf.shape))
        total += leaf.dtype.itemsize * math.prod(leaf.shape)
        local += bytes_each
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        rows.append((name, str(tuple(leaf.shape)), str(sharding.spec), f"{bytes_each:,}"))
    rows.append(("total", "", f"{total:,} bytes in all", f"{local:,}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )

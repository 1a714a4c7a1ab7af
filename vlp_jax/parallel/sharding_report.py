"""Reports the sharding of a train state: a row for each parameter, and bytes per device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from vlp_jax.parallel import rules

# The mesh axes that shard a state. `replica` holds copies.
SHARDING_AXES = ("fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Row:
    """A parameter and its sharding.

    Attributes:
      names: the logical name of each dimension; None for an unnamed dimension.
      spec: the mesh axes of each dimension; () for a dimension that is not sharded.
      bytes_per_device: bytes of a shard.
    """

    path: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    spec: tuple[tuple[str, ...], ...]
    bytes_per_device: int

    @property
    def is_whole(self) -> bool:
        """Whether every device holds the whole parameter."""
        return not any(self.spec)


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


def _local_bytes(leaf: Any) -> int:
    return leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape))


def spread(tree: Any, mesh: Mesh) -> Spread:
    """Measures a tree of arrays, or of abstract arrays with shardings."""
    leaves = jax.tree.leaves(tree)
    total = sum(leaf.dtype.itemsize * math.prod(leaf.shape) for leaf in leaves)
    local = sum(_local_bytes(leaf) for leaf in leaves)
    parts = math.prod(mesh.shape[axis] for axis in SHARDING_AXES)
    return Spread(total, local, local * parts / total if total else 1.0)


def rows(params: Any, boxed: Any) -> list[Row]:
    """Makes a row for each parameter, in the order of the tree.

    Args:
      params: abstract parameters with shardings.
      boxed: the same tree with logical names, as `Objective.init` returns it.
    """
    result = []
    with_names = jax.tree.leaves(boxed, is_leaf=rules.is_boxed)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    for (path, leaf), box in zip(leaves, with_names, strict=True):
        assert nn.unbox(box).shape == leaf.shape, (path, box, leaf)
        # A PartitionSpec may leave out the last dimensions.
        spec = (*leaf.sharding.spec, *(None,) * (leaf.ndim - len(leaf.sharding.spec)))
        result.append(
            Row(
                path=jax.tree_util.keystr(path, simple=True, separator="/"),
                shape=tuple(leaf.shape),
                names=rules.names_of(box),
                spec=tuple(
                    axes if isinstance(axes, tuple) else () if axes is None else (axes,)
                    for axes in spec
                ),
                bytes_per_device=_local_bytes(leaf),
            )
        )
    return result


def table(rows: Sequence[Row]) -> str:
    """Formats a line for each row: path, each dimension as `name=size/axes`, bytes on a device."""
    cells = [(row.path, _dimensions(row), f"{row.bytes_per_device:,}") for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(3)]
    return "\n".join(
        f"{path.ljust(widths[0])}  {dims.ljust(widths[1])}  {size.rjust(widths[2])}"
        for path, dims, size in cells
    )


def _dimensions(row: Row) -> str:
    parts = [
        f"{name or '.'}={size}" + (f"/{'+'.join(axes)}" if axes else "")
        for name, size, axes in zip(row.names, row.shape, row.spec, strict=True)
    ]
    return " ".join(parts) or "scalar"


def warnings(rows: Sequence[Row], mesh: Mesh) -> list[str]:
    """Returns a line for each kind of parameter that the mesh shards less than one would expect."""
    lines = []
    tensor = mesh.shape["tensor"]
    stuck: dict[tuple[str, int], int] = {}  # dimensions that `tensor` does not divide -> count
    for row in rows:
        for name, size, axes in zip(row.names, row.shape, row.spec, strict=True):
            if tensor > 1 and "tensor" not in axes and name in _tensor_names():
                stuck[name, size] = stuck.get((name, size), 0) + 1
    for (name, size), count in sorted(stuck.items()):
        lines.append(
            f"tensor {tensor} does not divide {size} {name}: {count} parameters lie whole along "
            "them, and every device of the tensor axis does the same work there"
        )
    left = whole(rows, mesh)
    if left:
        size = sum(row.bytes_per_device for row in left)
        lines.append(f"parameters that lie whole on every device: {len(left)}, of {size:,} bytes")
    return lines


def whole(rows: Sequence[Row], mesh: Mesh) -> list[Row]:
    """Selects the parameters that every device holds whole, although the mesh shards."""
    if all(mesh.shape[axis] == 1 for axis in SHARDING_AXES):
        return []
    return [row for row in rows if row.is_whole]


def _tensor_names() -> set[str]:
    return {name for name, axes in rules.AXIS_RULES if axes == "tensor"}

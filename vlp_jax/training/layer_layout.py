"""Stacked layers and separate layers: the same state under other names and shapes.

With `scan_layers` the layers of a tower are one array, "encoder/layers/mlp/up/kernel" with the
layers as its first dimension; without, each has its own, "encoder/layer_3/mlp/up/kernel". Averages
and the state of an optimizer follow the parameters. What is here goes by paths and shapes alone.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]
Abstract = Mapping[str, jax.ShapeDtypeStruct]
T = TypeVar("T")

# `param_groups.layer_by_layer` keeps the state of stacked layers in a group of its own, whose
# arrays all have the layers as their first dimension, its count of steps included.
GROUP = re.compile(r"(.*/inner_states/)(single|stack_of_(\d+))(/inner_state/.*)")


def stacked_name(path: str) -> tuple[str, int | None]:
    """("encoder/layers/mlp", 3) of "encoder/layer_3/mlp"; a path of no layer as it is, and None."""
    match = re.fullmatch(r"((?:.*/)?)layer_(\d+)(/.*)", path)
    return (f"{match[1]}layers{match[3]}", int(match[2])) if match else (path, None)


def stack_layers(flat: Mapping[str, T], join: Callable[[list[T]], T]) -> dict[str, T]:
    """path -> value with the layers under one name: `join` of their values, from first to last."""
    found: dict[str, T] = {}
    layers: dict[str, dict[int, T]] = {}
    for path, value in flat.items():
        name, index = stacked_name(path)
        if index is None:
            found[name] = value
        else:
            layers.setdefault(name, {})[index] = value
    for name, values in layers.items():
        found[name] = join([values[index] for index in sorted(values)])
    return found


class Kind(enum.Enum):
    """How an array of the model comes from those of a checkpoint.

    SAME: it is there as it is. STACK: several layers, stacked along a new first dimension. LAYER:
    number `n` of stacked layers. COUNT: the steps that an optimizer has done, which are the same
    in all groups; repeated `n` times for a group of n stacked layers, and one number for n = 0.
    """

    SAME = "same"
    STACK = "stack"
    LAYER = "layer"
    COUNT = "count"


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where an array of the model is in a checkpoint: at `paths`, more than one for a STACK."""

    kind: Kind
    paths: tuple[str, ...]
    n: int = 0

    def shape(self, saved: Shapes) -> Shape:
        """The shape of the array that it gives."""
        first = saved[self.paths[0]]
        return {
            Kind.SAME: first,
            Kind.STACK: (len(self.paths), *first),
            Kind.LAYER: first[1:],
            Kind.COUNT: (self.n,) if self.n else (),
        }[self.kind]


def find_origins(saved: Shapes, wanted: Shapes) -> dict[str, Origin]:
    """path in the model -> where its array is in the checkpoint; one that is nowhere is left out.

    Args:
      saved, wanted: path -> shape of all arrays of the two states.
    """
    stacked: dict[str, str] = {}
    separate: dict[str, dict[int, str]] = {}
    counts: dict[str, list[str]] = {}
    for path in sorted(saved):
        name, layer, count_of = _place(path)
        if count_of is not None:
            counts.setdefault(name, []).append(path)
        elif layer is None:
            stacked[name] = path
        else:
            separate.setdefault(name, {})[layer] = path

    def origin(path: str) -> Origin | None:
        name, layer, count_of = _place(path)
        if path in saved:
            return Origin(Kind.SAME, (path,))
        if count_of is not None:
            return Origin(Kind.COUNT, (counts[name][0],), count_of) if name in counts else None
        if layer is not None:
            there = name in stacked and layer < saved[stacked[name]][0]
            return Origin(Kind.LAYER, (stacked[name],), layer) if there else None
        layers = separate.get(name, {})
        whole = sorted(layers) == list(range(len(layers)))
        alike = len({saved[path] for path in layers.values()}) == 1
        paths = tuple(layers[index] for index in sorted(layers))
        return Origin(Kind.STACK, paths) if whole and alike else None

    found = {path: origin(path) for path in wanted}
    return {path: origin for path, origin in found.items() if origin is not None}


def _place(path: str) -> tuple[str, int | None, int | None]:
    """The name that a path has in both layouts, its layer, and of a count how many it counts for.

    The layer is None for what has all layers or belongs to none, the last is None for no count.
    """
    name, layer = stacked_name(path)
    group = GROUP.fullmatch(name)
    if group is None:
        return name, layer, None
    common = f"{group[1]}single{group[4]}"
    if "/layers/" in name:
        return common, layer, None
    is_count = group[4].endswith("/count")
    return (common, None, int(group[3] or 0)) if is_count else (name, None, None)


def converted_shapes(saved: Shapes, origins: Mapping[str, Origin]) -> dict[str, Shape]:
    """The shapes of a checkpoint as the model would have them; what has no place stays."""
    used = {path for origin in origins.values() for path in origin.paths}
    shapes = {path: origin.shape(saved) for path, origin in origins.items()}
    # All counts are the same number, so one that the model does not have is no loss.
    spare = {path for path in saved if _place(path)[2] is not None} if is_other(origins) else set()
    shapes |= {path: saved[path] for path in saved if path not in used | spare}
    for path, origin in origins.items():
        if origin.kind is Kind.LAYER:  # a layer that the model does not have is there all the same
            before, _, after = path.rpartition(f"layer_{origin.n}/")
            for layer in range(saved[origin.paths[0]][0]):
                shapes.setdefault(f"{before}layer_{layer}/{after}", origin.shape(saved))
    return shapes


def is_other(origins: Mapping[str, Origin]) -> bool:
    """Whether anything has to be converted."""
    return any(origin.kind is not Kind.SAME for origin in origins.values())


def describe(origins: Mapping[str, Origin]) -> str:
    """One line on what is converted; empty if nothing is."""
    kinds = [origin.kind for path, origin in origins.items() if path.startswith(("params", "ema"))]
    apart, together = kinds.count(Kind.LAYER), kinds.count(Kind.STACK)
    parts = [f"stacked layers taken apart into {apart:,} arrays"] if apart else []
    parts += [f"separate layers stacked into {together:,} arrays"] if together else []
    return " and ".join(parts)


def saved_layout(
    saved: Shapes, wanted: Abstract, origins: Mapping[str, Origin]
) -> dict[str, jax.ShapeDtypeStruct]:
    """path -> shape, dtype and sharding of what has to be read of a checkpoint.

    A layer lies as the stack that it is of or is to be: without the first dimension.
    """
    found: dict[str, jax.ShapeDtypeStruct] = {}
    for path, origin in origins.items():
        leaf = wanted[path]
        sharding = leaf.sharding
        if origin.kind is Kind.STACK:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
        elif origin.kind is Kind.LAYER:
            sharding = NamedSharding(sharding.mesh, PartitionSpec(None, *sharding.spec))
        elif origin.kind is Kind.COUNT:
            sharding = NamedSharding(sharding.mesh, PartitionSpec())
        for source in origin.paths:
            found[source] = jax.ShapeDtypeStruct(saved[source], leaf.dtype, sharding=sharding)
    return found


def convert(
    arrays: dict[str, jax.Array], wanted: Abstract, origins: Mapping[str, Origin]
) -> dict[str, jax.Array]:
    """path in the model -> array, laid out as `wanted` says, bit for bit what was read.

    This runs on the devices and empties `arrays`, one stack of layers after the other: at no time
    is there more than the state and one stack twice.

    Args:
      arrays: path in the checkpoint -> array, as `saved_layout` says.
    """
    made: dict[str, jax.Array] = {}
    groups: dict[tuple[str, ...], list[str]] = {}
    for path, origin in origins.items():
        if origin.kind is not Kind.SAME:
            groups.setdefault(origin.paths, []).append(path)
    # A count may be that of the model as well, so these are made before it is handed on.
    for sources, paths in groups.items():
        kinds = tuple((origins[path].kind, origins[path].n) for path in paths)
        function = _conversion(kinds, tuple(wanted[path].sharding for path in paths))
        made |= zip(paths, function([arrays[source] for source in sources]), strict=True)
        jax.block_until_ready([made[path] for path in paths])
        if kinds[0][0] is not Kind.COUNT:
            for source in sources:
                arrays.pop(source).delete()
    for path, origin in origins.items():
        if origin.kind is Kind.SAME:
            made[path] = arrays[path]
    arrays.clear()
    return made


@functools.cache
def _conversion(
    kinds: Sequence[tuple[Kind, int]], shardings: tuple[NamedSharding, ...]
) -> Callable[[list[jax.Array]], tuple[jax.Array, ...]]:
    """The arrays of `kinds` from their common sources; arrays alike share a compiled program."""

    def function(sources: list[jax.Array]) -> tuple[jax.Array, ...]:
        made = {
            Kind.STACK: lambda n: jnp.stack(sources),
            Kind.LAYER: lambda n: sources[0][n],
            Kind.COUNT: lambda n: jnp.broadcast_to(sources[0].reshape(-1)[0], (n,) if n else ()),
        }
        return tuple(made[kind](n) for kind, n in kinds)

    return jax.jit(function, out_shardings=shardings)

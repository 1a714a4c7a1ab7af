"""Mapping tables between our parameters and a foreign format's tensors.

A table is a list of `Entry`; the same entries read and write. It lists everything that a format can
store. Entries whose parameters a model does not have are skipped.

An `AxisOrder` holds the two sides of an einops pattern. So both directions only move numbers, and a
round trip returns the same bits. In this file "ours" is vlp_jax and "theirs" the foreign format.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import einops
import numpy as np

from vlp_jax.errors import UserError

Shape = tuple[int, ...]
SHOWN = 8  # names that an error lists before it says "and N more"


@dataclasses.dataclass(frozen=True)
class AxisOrder:
    """The order of axes of one parameter, or of several stacked ones, in ours and in theirs."""

    ours: str
    theirs: str

    def lengths(self, shape: Shape) -> dict[str, int]:
        """Returns the length of each named axis, from our shape."""
        return {} if self.ours == "..." else dict(zip(self.ours.split(), shape, strict=True))

    def their_shape(self, shape: Shape) -> Shape:
        """Returns their shape for our `shape`."""
        if self.theirs == "...":
            return shape
        lengths = {"1": 1, **self.lengths(shape)}
        groups = re.findall(r"\([^)]*\)|\S+", self.theirs)
        return tuple(math.prod(lengths[axis] for axis in g.strip("()").split()) for g in groups)


# i, o: inputs and outputs; h: heads; e: width of a head; d: width; t: our parameters that they
# store as one tensor; y, x, c: rows, columns and channels of a patch.
SAME = AxisOrder("...", "...")
LINEAR = AxisOrder("i o", "o i")  # torch.nn.Linear
CONV = AxisOrder("y x c o", "o c y x")  # torch.nn.Conv2d
HEADS_IN = AxisOrder("d h e", "(h e) d")  # queries, keys or values of torch.nn.Linear
HEADS_BIAS = AxisOrder("h e", "(h e)")
HEADS_OUT = AxisOrder("h e d", "d (h e)")
FUSED = AxisOrder("t d h e", "(t h e) d")
FUSED_BIAS = AxisOrder("t h e", "(t h e)")
SQUEEZED = AxisOrder("1 d", "d")  # one token of ours, a vector of theirs
BATCHED = AxisOrder("n d", "1 n d")  # tokens of ours, a batch of one of theirs
SCALAR = AxisOrder("", "1")
QKV = ("query", "key", "value")


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a table: one or several parameters of ours, and their tensor.

    Attributes:
      ours: paths; several parameters are stacked along a new first axis before reordering.
      theirs: the key. With `{i}` there is one tensor for each layer, and our parameter stacks them.
      axes: the order of axes, without the axis of layers.
    """

    ours: str | tuple[str, ...]
    theirs: str
    axes: AxisOrder = SAME

    @property
    def paths(self) -> tuple[str, ...]:
        """Our paths, as a tuple."""
        return (self.ours,) if isinstance(self.ours, str) else self.ours

    def keys(self, layers: int) -> list[str]:
        """Returns their keys: one for each of our stacked layers, or one in all."""
        if not self.layered:
            return [self.theirs]
        return [self.theirs.replace("{i}", str(i)) for i in range(layers)]

    @property
    def layered(self) -> bool:
        """Whether they have a tensor for each layer."""
        return "{i}" in self.theirs

    def their_shapes(self, shape: Shape) -> dict[str, Shape]:
        """Returns their keys and shapes, for parameters of ours with `shape`."""
        layers, shape = (shape[0], shape[1:]) if self.layered else (1, shape)
        if not isinstance(self.ours, str):
            shape = (len(self.ours), *shape)
        return dict.fromkeys(self.keys(layers), self.axes.their_shape(shape))

    def write(self, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Converts our parameters to their tensors."""
        arrays = [params[path] for path in self.paths]
        layers = list(zip(*arrays, strict=True)) if self.layered else [arrays]
        return {
            key: self._write_one(x) for key, x in zip(self.keys(len(layers)), layers, strict=True)
        }

    def read(self, tensors: Mapping[str, np.ndarray], shape: Shape) -> dict[str, np.ndarray]:
        """Converts their tensors to our parameters, each of `shape`."""
        one = shape[1:] if self.layered else shape
        keys = self.keys(shape[0] if self.layered else 1)
        layers = [self._read_one(tensors[key], one) for key in keys]
        # Their tensors are apart, one for each layer; ours is one array with the layers in front.
        arrays = map(np.stack, zip(*layers, strict=True)) if self.layered else layers[0]
        return dict(zip(self.paths, arrays, strict=True))

    def _write_one(self, arrays: Sequence[np.ndarray]) -> np.ndarray:
        x = np.asarray(arrays[0]) if isinstance(self.ours, str) else np.stack(arrays)
        return np.asarray(einops.rearrange(x, f"{self.axes.ours} -> {self.axes.theirs}"))

    def _read_one(self, x: np.ndarray, shape: Shape) -> list[np.ndarray]:
        stacked = not isinstance(self.ours, str)
        lengths = self.axes.lengths((len(self.paths), *shape) if stacked else shape)
        lengths.pop("1", None)  # a literal in einops patterns, not the name of an axis
        pattern = f"{self.axes.theirs} -> {self.axes.ours}"
        y = np.asarray(einops.rearrange(x, pattern, **lengths), dtype=np.float32)
        return list(y) if stacked else [y]


Table = list[Entry]


def modules(names: Mapping[str, str], ours: str = "", theirs: str = "") -> Table:
    """Maps modules of PyTorch with a weight, and a bias if ours has one: our path -> their name.

    The end of our path tells the kind of a module. All begin with `ours` and `theirs`.
    """
    entries = []
    for path, name in names.items():
        path = f"{ours}/{path}" if ours else path
        name = f"{theirs}.{name}" if theirs else name
        weight, axes, bias_axes = _kind(*f"/{path}".split("/")[-2:])
        entries.append(Entry(f"{path}/{weight}", f"{name}.weight", axes))
        entries.append(Entry(f"{path}/bias", f"{name}.bias", bias_axes))
    return entries


def _kind(parent: str, module: str) -> tuple[str, AxisOrder, AxisOrder]:
    """Returns our name of a module's weight, and the axes of weight and bias."""
    if "norm" in module:
        return "scale", SAME, SAME
    if parent == "attention":
        return ("kernel", HEADS_OUT, SAME) if module == "out" else ("kernel", HEADS_IN, HEADS_BIAS)
    return "kernel", CONV if parent == "patch_embedding" else LINEAR, SAME


def fused(ours: str, weight: str, bias: str, names: Sequence[str] = QKV) -> Table:
    """Maps several projections of an attention to one tensor of theirs."""
    return [
        Entry(tuple(f"{ours}/{name}/kernel" for name in names), weight, FUSED),
        Entry(tuple(f"{ours}/{name}/bias" for name in names), bias, FUSED_BIAS),
    ]


def to_theirs(table: Table, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts all our parameters to their tensors."""
    tensors: dict[str, np.ndarray] = {}
    for entry in _entries(table, params):
        tensors.update(entry.write(params))
    return tensors


def from_theirs(
    table: Table,
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, Shape],
    where: object,
    ignored: str = "",
) -> dict[str, np.ndarray]:
    """Converts their tensors to our parameters, which have the `expected` paths and shapes.

    Keys that match `ignored` may be there and are no parameters. Raises UserError if tensors are
    missing, left over, or of other shapes; one line lists them.
    """
    entries = _entries(table, expected)
    needed: dict[str, Shape] = {}
    for entry in entries:
        # All parameters of an entry have one shape, or they could not share a tensor.
        needed.update(entry.their_shapes(expected[entry.paths[0]]))
    given = {key: x for key, x in tensors.items() if not re.fullmatch(ignored, key)}
    report = mismatch_report(needed, shapes_of(given))
    if report:
        raise UserError(f"{where} does not fit the model: {report}")
    params: dict[str, np.ndarray] = {}
    for entry in entries:
        params.update(entry.read(given, expected[entry.paths[0]]))
    return params


def shapes_of(arrays: Mapping[str, Any]) -> dict[str, Shape]:
    """Returns the shape of each array."""
    return {key: tuple(np.shape(x)) for key, x in arrays.items()}


def mismatch_report(needed: Mapping[str, Shape], given: Mapping[str, Shape]) -> str:
    """Lists missing and unexpected tensors and wrong shapes in one line; "" if everything fits."""
    parts = {
        "missing": [f"{k} {list(needed[k])}" for k in sorted(needed.keys() - given.keys())],
        "unexpected": [f"{k} {list(given[k])}" for k in sorted(given.keys() - needed.keys())],
        "of another shape": [
            f"{k} {list(given[k])} instead of {list(needed[k])}"
            for k in sorted(needed.keys() & given.keys())
            if tuple(given[k]) != tuple(needed[k])
        ],
    }
    return "; ".join(f"{what}: {shorten(names)}" for what, names in parts.items() if names)


def shorten(names: Iterable[str]) -> str:
    """Lists the first names, and the number of the rest."""
    names = list(names)
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _entries(table: Table, paths: Iterable[str]) -> Table:
    """Selects the entries for `paths`; raises ValueError for a path without an entry."""
    paths = set(paths)
    # Two entries may read one tensor, for parameters of which a model has one (a norm before or
    # after the pooling).
    entries = [entry for entry in table if paths.issuperset(entry.paths)]
    covered = {path for entry in entries for path in entry.paths}
    if paths - covered:
        raise ValueError(f"the table has no entry for {shorten(sorted(paths - covered))}")
    return entries

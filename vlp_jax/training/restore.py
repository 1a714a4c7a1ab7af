"""Reads checkpoints into arrays on any mesh and any number of processes, by paths and shapes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote
from vlp_jax.training import checkpoint_files
from vlp_jax.training.param_groups import flatten, unflatten

Shape = tuple[int, ...]
LAYER = re.compile(r"(^|.*/)layer_(\d+)/(.*)")  # a path in which a layer stands by itself

MAX_LISTED = 4  # parameters that a mismatch names
# Which parameters of a checkpoint are meant: "auto" is the average if there is one.
CHOICES = ("auto", "params", "ema")


MEMORY = "guard/"  # what may be in the state or not, as `config.guard` says


def shapes_of(tree: Any) -> dict[str, Shape]:
    """ "params/image/..." -> shape, for every array of a tree of arrays or Orbax's metadata."""
    return {path: tuple(leaf.shape) for path, leaf in _flatten(tree).items()}


def _flatten(tree: Any) -> dict[str, Any]:
    """path -> leaf, of those that have a shape."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=_is_array)
    return {_name(path): leaf for path, leaf in leaves if _is_array(leaf)}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_array(leaf: Any) -> bool:
    return hasattr(leaf, "shape")


def metadata(directory: epath.Path) -> dict[str, Any]:
    """Reads the tree of what a state in a checkpoint holds."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(directory).tree


def unreadable(directory: epath.Path) -> str | None:
    """Says why a checkpoint without checksums cannot be read, one array at a time; else None."""
    if (directory / checkpoint_files.CHECKSUMS).exists() or is_remote(directory):
        return None
    try:
        json.loads((directory / "input" / "metadata").read_text())
        if not shapes_of(metadata(directory / "state").get("params")):
            return "its metadata names no parameters"
        # Orbax stores every array as a zarr array within one OCDBT key-value store.
        kvstore = {"driver": "file", "path": f"{directory / 'state'}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": kvstore}).result()
        for key in store.list().result():
            name, slash, file = key.decode().rpartition("/")
            if file == ".zarray":
                array = {"driver": "zarr", "kvstore": {**store.spec().to_json(), "path": name}}
                tensorstore.open(array).result().read().result()
    except (OSError, ValueError, KeyError) as error:
        return f"it cannot be read: {str(error).splitlines()[0][:200]}"
    return None


@contextlib.contextmanager
def _told_if_damaged(directory: epath.Path) -> Iterator[None]:
    """Raises UserError instead of what Orbax raises on reading a damaged checkpoint."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:
        # Only after a failure, because it reads every file.
        what = checkpoint_files.damage(directory) or unreadable(directory)
        if what is None:
            raise
        raise checkpoint_files.damaged_error(directory, what) from error


def mismatch_report(saved: Mapping[str, Shape], wanted: Mapping[str, Shape]) -> str:
    """Says in a line how two trees of shapes differ, parameters first; "" if they are equal."""

    def differing(prefix: str) -> list[str]:
        keys = sorted(k for k in {*saved, *wanted} if k.startswith(prefix))
        return [
            f"{key} is {saved.get(key, 'absent')} in the checkpoint "
            f"and {wanted.get(key, 'absent')} in the model"
            for key in keys
            if saved.get(key) != wanted.get(key)
        ]

    rows = differing("params/") or differing("")
    more = [f"and {len(rows) - MAX_LISTED} more"] if len(rows) > MAX_LISTED else []
    return ", ".join(rows[:MAX_LISTED] + more)


def _check_stacked(directory: epath.Path, paths: Collection[str]) -> None:
    """Raises UserError for a checkpoint of an older version, with each layer by itself."""
    apart = next((path for path in paths if LAYER.fullmatch(path)), None)
    if apart is not None:
        raise UserError(
            f"the checkpoint {directory.parent} keeps each layer by itself ({apart}), as older "
            f"versions did with scan_layers=False; python -m tools.stack_layers "
            f"{directory.parent.parent.parent} --output DIR makes a workdir of it that can be read"
        )


def check(
    directory: epath.Path, abstract: Any, tree: Any = None
) -> tuple[dict[str, Any], set[str]]:
    """Compares a checkpoint with the arrays that are wanted; reads its table of contents alone.

    Args:
      directory: of the state in the checkpoint, "checkpoints/STEP/state".
      abstract: a `TrainState`, or a dict with some of its fields, of which alone it reads.
      tree: what is read of Orbax's metadata, if not the whole of these fields.

    Returns:
      The metadata of what is read, and the paths in `abstract` that begin anew, as zeros: the
      memory of the rule about spikes of the loss, where the checkpoint has none.

    Raises:
      UserError: the checkpoint holds other parameters, which are named with both shapes.
    """
    whole = not isinstance(abstract, dict)  # else it is the average that is a model's
    if tree is None:
        tree = metadata(directory)
    saved, wanted = shapes_of(tree), shapes_of(abstract)
    _check_stacked(directory, saved)
    unused = saved.keys() - wanted.keys()
    # The spike rule may have been turned on or off since: on one side alone, its arrays are no
    # mismatch.
    memory = {path for path in saved.keys() ^ wanted.keys() if path.startswith(MEMORY)}
    fresh = memory & wanted.keys()
    wanted = {path: shape for path, shape in wanted.items() if path not in memory}
    saved = {path: shape for path, shape in saved.items() if path not in memory}
    report = mismatch_report(saved, wanted)
    differing = {path for path in {*saved, *wanted} if saved.get(path) != wanted.get(path)}
    if whole and report and all(x.startswith(("opt_state/", "ema/")) for x in differing):
        raise UserError(
            f"the checkpoint {directory.parent} was written with another config.optimizer "
            f"({len(differing)} arrays of its state differ): set it as it was, or give another "
            "workdir and config.init_from.source, which takes the parameters alone"
        )
    if report:
        raise UserError(
            f"the checkpoint {directory.parent} belongs to another model: {report}; "
            "use the config it was trained with, or another workdir"
        )
    return _without(tree, unused), fresh


def read(directory: epath.Path, abstract: Any, tree: Any = None) -> Any:
    """Reads the arrays of `abstract`, laid out as there; for the arguments see `check`."""
    tree, fresh = check(directory, abstract, tree)
    leaves = _flatten(abstract)

    def arguments(path: str, leaf: Any) -> ocp.ArrayRestoreArgs:
        like = leaves[path]
        return ocp.ArrayRestoreArgs(
            sharding=like.sharding, global_shape=like.shape, dtype=like.dtype
        )

    made = _flatten(_restore(directory, tree, lambda path, leaf: leaves[path], arguments))
    for path in fresh:
        zeros = np.zeros(leaves[path].shape, leaves[path].dtype)
        made[path] = jax.make_array_from_callback(
            zeros.shape, leaves[path].sharding, lambda index, zeros=zeros: zeros[index]
        )
    # Orbax gives back dicts and lists in an order of its own, so leaves are placed by their
    # paths.
    return jax.tree.unflatten(jax.tree.structure(abstract), [made[p] for p in leaves])


def _without(tree: Any, paths: Collection[str], above: str = "") -> Any:
    """The tree without the arrays at `paths`, all of which are in mappings."""
    if isinstance(tree, dict):
        kept = {}
        for key, value in tree.items():
            if f"{above}{key}" in paths:
                continue
            rest = _without(value, paths, f"{above}{key}/")
            if rest == {} and value != {}:  # all of it is left out, and its name as well
                continue
            kept[key] = rest
        return kept
    if isinstance(tree, list | tuple):
        return [_without(value, paths, f"{above}{i}/") for i, value in enumerate(tree)]
    return tree


def _restore(
    directory: epath.Path,
    tree: Any,
    item: Callable[[str, Any], Any],
    arguments: Callable[[str, Any], ocp.RestoreArgs],
) -> Any:
    """The arrays of `tree`, all or a part of what the metadata names; no others are read."""

    def each(function: Callable[[str, Any], Any]) -> Any:
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: function(_name(path), leaf) if _is_array(leaf) else leaf,
            tree,
            is_leaf=_is_array,
        )

    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(
            directory,
            args=ocp.args.PyTreeRestore(
                item=each(item), restore_args=each(arguments), partial_restore=True
            ),
        )


def read_on_host(directory: epath.Path, tree: Any, dtype: Any = None) -> dict[str, np.ndarray]:
    """Reads the arrays of `tree`, a part of the metadata, by path; `dtype` None keeps theirs."""
    restored = _restore(
        directory,
        tree,
        lambda path, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype),
        lambda path, leaf: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype),
    )
    return {path: np.asarray(leaf, dtype) for path, leaf in _flatten(restored).items()}


@dataclasses.dataclass(frozen=True)
class LoadedParameters:
    """Parameters on a mesh, trained for `step` steps; `part` is "params" or "ema"."""

    step: int
    part: str
    params: Any


@dataclasses.dataclass(frozen=True)
class SavedParameters:
    """Parameters of a checkpoint ("params" or "ema"), of whatever model and mesh; path -> shape."""

    directory: epath.Path
    step: int
    part: str
    shapes: dict[str, Shape]

    @classmethod
    def of(cls, workdir: epath.Path, step: int, choice: str = "auto") -> Self:
        """Looks up a checkpoint's parameters by `CHOICES`; UserError without the wanted average."""
        directory = workdir / "checkpoints" / str(step) / "state"
        with _told_if_damaged(directory.parent):
            tree = metadata(directory)
        has_average = bool(shapes_of(tree["ema"]))
        if choice == "ema" and not has_average:
            raise UserError(
                f"the checkpoint {directory.parent} holds no averaged parameters, as its run had "
                "config.optimizer.ema_decay=0; ask for its parameters"
            )
        part = "ema" if choice != "params" and has_average else "params"
        # An average of some parameters covers these alone; the rest comes from `params`.
        shapes = {**shapes_of(tree["params"]), **shapes_of(tree[part])}
        _check_stacked(directory, shapes)
        return cls(directory, step, part, shapes)

    def read(self) -> dict[str, np.ndarray]:
        """path -> float32 array on the host, every process reading all of them."""
        with _told_if_damaged(self.directory.parent):
            parts = self._parts(metadata(self.directory))
            arrays = read_on_host(self.directory, parts, np.float32)
        leaves = {path.partition("/")[2]: array for path, array in arrays.items()}
        return {path: leaves[path] for path in self.shapes}

    def _parts(self, tree: Mapping[str, Any]) -> dict[str, Any]:
        """Selects from a state's tree the average, and the parameters that have none."""
        averaged = shapes_of(tree[self.part])
        found = {self.part: tree[self.part]}
        if self.part == "ema" and self.shapes.keys() - averaged.keys():
            found["params"] = _without(tree["params"], averaged)
        return found

    def load(self, abstract: Any) -> LoadedParameters:
        """Loads them like `abstract`, each device its own shard; UserError for another model."""
        with _told_if_damaged(self.directory.parent):
            found = self._parts(metadata(self.directory))
            plain = shapes_of(abstract).keys() & shapes_of(found.get("params", {})).keys()
            wanted = {self.part: abstract}
            if self.part == "ema" and plain:
                averaged = shapes_of(abstract).keys() - plain
                wanted = {"ema": _without(abstract, plain), "params": _without(abstract, averaged)}
            arrays = read(self.directory, wanted, found)
            params = {path: x for tree in arrays.values() for path, x in flatten(tree).items()}
            return LoadedParameters(self.step, self.part, unflatten(params))

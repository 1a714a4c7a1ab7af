"""Checkpoints in a workdir, with Orbax."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.observe.jsonl import is_remote
from vlp_jax.training.state import TrainState

MAX_LISTED = 4  # parameters that a mismatch names


class Checkpointer:
    """Saves states under `workdir/checkpoints/STEP` and gives back the newest.

    The checkpoint at step i holds all that is needed to go on with batch i: the state, and a
    small record of the input (`input_state.InputState`). Saving is asynchronous: `save` returns as
    soon as the arrays are on the host. A checkpoint appears under its final name only when it is
    whole.

    Args:
      keep_last: how many of the newest to keep.
      keep_every: also keep each whose step is a multiple of this; 0 for none.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        asynchronous: bool = True,
    ):
        if keep_last < 1:
            raise UserError(f"config.checkpoint.keep_last must be at least 1, not {keep_last}")
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._directory = absolute(workdir) / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self._directory,
            item_handlers={
                "state": ocp.StandardCheckpointHandler(),
                "input": ocp.JsonCheckpointHandler(),
            },
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.AnyPreservationPolicy(policies),
                enable_async_checkpointing=asynchronous,
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, input_state: Mapping[str, Any]) -> None:
        """Saves `state`, just before batch `step`, unless that checkpoint exists already."""
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), input=ocp.args.JsonSave(dict(input_state))
            ),
            force=True,
        )

    def check_fits(self, abstract: TrainState) -> int:
        """Step of the newest checkpoint, whose state `restore` can put into `abstract`; 0 if none.

        Raises:
          UserError: the checkpoint holds other parameters; it names them with both shapes.
        """
        step = self.latest_step()
        if step is None:
            return 0
        saved = shapes_of(self._manager.item_metadata(step).state)
        report = mismatch_report(saved, shapes_of(abstract))
        if report:
            raise UserError(
                f"the checkpoint {self._directory / str(step)} belongs to another model: {report}; "
                "use the config it was trained with, or another workdir"
            )
        return step

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step` as arrays laid out as `abstract` says.

        Args:
          abstract: one that `check_fits`.
          step: of a checkpoint that exists.
        """
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        return self._manager.restore(step, args=args).state

    def input_state(self, step: int) -> dict[str, Any]:
        """The record of the input in the checkpoint at `step`, which exists."""
        args = ocp.args.Composite(input=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).input

    def wait(self) -> None:
        """Returns when everything saved is on disk."""
        self._manager.wait_until_finished()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        """Finishes what is being written."""
        self._manager.close()


def absolute(path: str | epath.Path) -> epath.Path:
    """`path` from the root, as Orbax wants it; one on a bucket (gs://...) is so already."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def saved_steps(workdir: epath.Path) -> list[int]:
    """Steps of all whole checkpoints in `workdir`, in order. Nothing is written."""
    return sorted(ocp.utils.checkpoint_steps(workdir / "checkpoints"))


@dataclasses.dataclass(frozen=True)
class SavedParameters:
    """The parameters of a checkpoint, of whatever model and mesh; nothing else of it is read.

    Attributes:
      directory: of the state in the checkpoint.
      part: "ema" if the checkpoint has averaged parameters, else "params".
      shapes: path -> shape.
    """

    directory: epath.Path
    part: str
    shapes: dict[str, tuple[int, ...]]

    @classmethod
    def of(cls, workdir: epath.Path, step: int) -> Self:
        """Those of the checkpoint at `step`, which exists."""
        directory = workdir / "checkpoints" / str(step) / "state"
        tree = _metadata(directory)
        part = "ema" if shapes_of(tree["ema"]) else "params"
        return cls(directory, part, shapes_of(tree[part]))

    def read(self) -> dict[str, np.ndarray]:
        """path -> float32 array on the host, every process reading all of them."""
        part = {self.part: _metadata(self.directory)[self.part]}

        def each(function: Callable[[Any], Any]) -> Any:
            return jax.tree.map(function, part, is_leaf=lambda x: hasattr(x, "shape"))

        with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
            restored = handler.restore(
                self.directory,
                args=ocp.args.PyTreeRestore(
                    item=each(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)),
                    restore_args=each(
                        lambda x: ocp.RestoreArgs(restore_type=np.ndarray, dtype=np.float32)
                    ),
                    partial_restore=True,
                ),
            )
        leaves = jax.tree_util.tree_leaves_with_path(restored[self.part])
        return {
            jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x, np.float32)
            for path, x in leaves
        }


def _metadata(directory: epath.Path) -> dict[str, Any]:
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.metadata(directory).tree


def shapes_of(tree: Any) -> dict[str, tuple[int, ...]]:
    """ "params/image/..." -> shape, for every array of a tree of arrays or Orbax's metadata."""
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(leaf.shape)
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def mismatch_report(saved: dict[str, tuple[int, ...]], wanted: dict[str, tuple[int, ...]]) -> str:
    """What differs between two trees of shapes, one line; empty if nothing does.

    Optimizer state and averages follow the parameters, so these are named only where the
    parameters agree.
    """

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

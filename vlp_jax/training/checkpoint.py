"""Saves and restores the checkpoints in a workdir, with Orbax."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from vlp_jax.errors import CannotSave, UserError, first_line
from vlp_jax.files import check_writable, is_remote
from vlp_jax.parallel import agreement
from vlp_jax.training import checkpoint_files, restore
from vlp_jax.training.checkpoint_files import (
    Manager,
    processes,
    quiet_failures,
    saved_steps,
    state_handler,
)
from vlp_jax.training.restore import unreadable
from vlp_jax.training.state import TrainState

# Errors that Orbax and TensorStore raise when files cannot be written: OSError, ValueError with the
# system's words, RuntimeError from the threads that write.
SAVE_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError)
_log = logging.getLogger("vlp_jax.training")
_openings = itertools.count()  # numbers the managers; the same number on all processes


class Checkpointer:
    """Saves states under `workdir/checkpoints/STEP` and restores the newest.

    The checkpoint at step i holds all that is needed to go on with batch i: the state, and a
    small record of the input (`input_state.InputState`). `save` returns as soon as the arrays are
    on the host. A checkpoint gets its final name only when it is complete, with checksums of its
    files. On opening, damaged checkpoints are set aside, from the newest on until one is sound.

    A save that fails, most often because the disk is full, is reported and does not end the run. It
    ends the run if it has to succeed (`finish`), or if too many fail in a row.

    Args:
      keep_last: the number of newest checkpoints to keep.
      keep_every: also keep each checkpoint whose step is a multiple of this; 0 for none.
      max_failed: the run ends when this many saves in a row have failed.
      read_only: neither save nor remove anything: for a workdir that a run may be writing to.
      tell: takes a line about a failure.

    Attributes:
      failed: the number of saves that have failed.
    """

    def __init__(
        self,
        workdir: str | epath.Path,
        *,
        keep_last: int = 1,
        keep_every: int = 0,
        asynchronous: bool = True,
        max_failed: int = 5,
        read_only: bool = False,
        tell: Callable[[str], None] = _log.warning,
    ):
        if keep_last < 1:
            raise UserError(f"config.checkpoint.keep_last must be at least 1, not {keep_last}")
        if max_failed < 1:
            raise UserError(f"config.checkpoint.max_failed must be at least 1, not {max_failed}")
        policies = [ocp.checkpoint_managers.LatestN(keep_last)]
        if keep_every:
            policies.append(ocp.checkpoint_managers.EveryNSteps(keep_every))
        self._keep = ocp.checkpoint_managers.AnyPreservationPolicy(policies)
        self._directory = absolute(workdir) / "checkpoints"
        self._asynchronous, self._read_only = asynchronous, read_only
        self._max_failed, self._tell = max_failed, tell
        self._barrier = agreement.Barrier()
        self._writing: int | None = None  # the step whose checkpoint is being written
        self._in_a_row = self.failed = 0
        quiet_failures()
        if not read_only:
            checkpoint_files.check_path(self._directory.parent)
            for line in agreement.on_first(lambda: mend(self._directory)):
                self._tell(line)
            agreement.on_first(self._make_directory)
        self._manager = self._open()

    def _open(self) -> Manager:
        several = processes(next(_openings))
        try:
            return Manager(
                self._directory,
                item_handlers={
                    "state": state_handler(several),
                    "input": ocp.JsonCheckpointHandler(multiprocessing_options=several),
                },
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=None if self._read_only else self._keep,
                    async_options=ocp.AsyncOptions(
                        barrier_sync_fn=self._barrier,
                        post_finalization_callback=self._add_checksums,
                    ),
                    multiprocessing_options=several,
                    cleanup_tmp_directories=not self._read_only,
                    read_only=self._read_only,
                    # Process 0 makes the folder (`_make_directory`), so that its errors are told in
                    # our words.
                    create=False,
                ),
            )
        except OSError as error:
            raise CannotSave(_no_place(self._directory, error)) from error

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            check_writable(self._directory)  # one that exists may still be read-only
        except OSError as error:
            raise CannotSave(_no_place(self._directory, error)) from error

    def _add_checksums(self) -> None:
        """Writes checksums. Orbax calls it on process 0, in the background, before the renaming."""
        step = self._writing
        for directory in [*checkpoint_files.unfinished(self._directory, step)] or [
            self._directory / str(step)  # an object store has no renaming, so no temporary name
        ]:
            checkpoint_files.write_checksums(directory)

    def steps(self) -> list[int]:
        """Returns the steps of all complete checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, input_state: Mapping[str, Any]) -> None:
        """Starts to save the state before batch `step`, unless it exists; all processes call it.

        Raises:
          CannotSave: too many saves in a row have failed.
        """
        # First: `_writing` holds one step, and a save that failed must be reported under its own.
        self.wait()
        if step in self._manager.all_steps():
            return
        try:
            agreement.on_first(lambda: self._check_room(state))
        except UserError as error:
            self._note_failure(step, str(error))
            return
        self._barrier.renew()  # a barrier that a failed save has left behind never opens
        self._writing, error = step, None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), input=ocp.args.JsonSave(dict(input_state))
                ),
                # The loop decides which steps are saved, and not a policy of Orbax.
                force=True,
            )
        except SAVE_ERRORS as caught:
            error = caught
        # All processes take the same branch: one alone in `_settle` would wait for the others for
        # ever.
        failed = any(agreement.gather(error is not None))
        if failed or not self._asynchronous:
            self._settle(error)

    def poll(self) -> None:
        """Reports how the save under way ended, if it has; raises as `save`. All call it."""
        if self._writing is not None:
            over = not self._manager.is_saving_in_progress()
            if all(agreement.gather(over)):
                self._settle(None)

    def wait(self) -> None:
        """Waits until nothing is being written; raises as `save`. All processes must call it."""
        if self._writing is not None:
            self._settle(None)

    def finish(self, step: int) -> None:
        """Waits until the checkpoint of `step` is on disk; CannotSave if it cannot be written."""
        self.wait()
        if step not in self.steps():
            newest = self.latest_step()
            kept = "no checkpoint is kept" if newest is None else f"the newest is of step {newest}"
            raise CannotSave(
                f"the checkpoint of step {step} could not be saved in {self._directory}, {kept}; "
                "make room or mend the disk, and run the same command to go on from there"
            )

    def _settle(self, error: Exception | None) -> None:
        """Waits for the save under way, and lets all processes agree on how it ended."""
        step = self._writing  # `_add_checksums` reads the attribute in the background until then
        try:
            self._manager.wait_until_finished()
        except SAVE_ERRORS as caught:
            error = error or caught
        self._writing = None
        if error is not None:
            self._barrier.fail(str(error))
        reasons = agreement.gather(None if error is None else first_line(error))
        failed = [f"process {i}: {text}" for i, text in enumerate(reasons) if text is not None]
        if not failed:
            self._in_a_row = 0
            return
        self._reopen(step)
        self._note_failure(step, failed[0].removeprefix("process 0: "))

    def _reopen(self, step: int) -> None:
        """Opens a new manager after a failure: the old one would raise its error for ever."""
        with contextlib.suppress(*SAVE_ERRORS):  # the failure that is reported already
            self._manager.close()
        if jax.process_index() == 0:
            for directory in checkpoint_files.unfinished(self._directory, step):
                directory.rmtree(missing_ok=True)
        self._barrier.renew()
        self._manager = self._open()

    def _note_failure(self, step: int, reason: str) -> None:
        self.failed += 1
        self._in_a_row += 1
        newest = self.latest_step()
        kept = "none is kept yet" if newest is None else f"the newest is of step {newest}"
        what = f"the checkpoint of step {step} could not be saved ({reason}); {kept}"
        if self._in_a_row >= self._max_failed:
            raise CannotSave(
                f"{what}; {self._in_a_row} saves in a row have failed: make room, or mend the "
                "disk, and run the same command to go on"
            )
        self._tell(f"warning: {what}; failure {self._in_a_row} of {self._max_failed} in a row")

    def _check_room(self, state: TrainState) -> None:
        """Raises UserError without room for 4/5 of a checkpoint, or half of the arrays."""
        newest = self.latest_step()
        likely = sum(leaf.nbytes for leaf in jax.tree.leaves(state)) // 2
        try:
            free = checkpoint_files.free_bytes(self._directory)
            if newest is not None:
                likely = checkpoint_files.size_of(self._directory / str(newest)) * 4 // 5
        except OSError as error:
            raise UserError(f"{self._directory} cannot be looked at: {error}") from error
        if free is not None and free < likely:
            raise UserError(
                f"{free:,} bytes are free in {self._directory} and about {likely:,} are needed"
            )

    def check_fits(self, abstract: TrainState) -> int:
        """Checks that the newest checkpoint fits `abstract`; returns its step, 0 if there is none.

        Raises:
          UserError: the checkpoint holds other parameters; the error lists them with both shapes.
        """
        step = self.latest_step()
        if step is None:
            return 0
        restore.check(self._state(step), abstract)
        return step

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """Restores the state at `step` like `abstract`, which passed `check_fits`."""
        return restore.read(self._state(step), abstract)

    def _state(self, step: int) -> epath.Path:
        return self._directory / str(step) / "state"

    def input_state(self, step: int) -> dict[str, Any]:
        """Returns the input's record in the checkpoint at `step`, which must exist."""
        args = ocp.args.Composite(input=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).input

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Waits for the save under way, unless this is a failed one of several processes."""
        if kind is None or jax.process_count() == 1 or issubclass(kind, UserError):
            self._manager.close()


def mend(checkpoints: epath.Path) -> list[str]:
    """Sets damaged checkpoints aside, the newest first; a line each. UserError if none is sound."""
    if not checkpoints.exists():
        return []
    entries = [e for e in checkpoints.iterdir() if e.name.isdecimal() and not e.is_dir()]
    # With the name of a checkpoint's folder: a save of that step would fail.
    damaged = dict.fromkeys(entries, "it is no folder")
    steps = saved_steps(checkpoints.parent)
    sound = not steps
    for step in reversed(steps):
        directory = checkpoints / str(step)
        what = checkpoint_files.damage(directory) or unreadable(directory)
        if what is None:
            sound = True
            break
        damaged[directory] = what
    if not sound or (damaged and not steps):
        reasons = "; ".join(f"step {directory.name}: {what}" for directory, what in damaged.items())
        raise UserError(
            f"every checkpoint in {checkpoints} is damaged ({reasons}): put a sound copy of one in "
            "its place, or give another --workdir to begin anew"
        )
    return [
        f"warning: the checkpoint of step {directory.name} is damaged ({what}); moved to "
        f"{checkpoint_files.set_aside(directory)}"
        for directory, what in damaged.items()
    ]


def _no_place(directory: epath.Path, error: OSError) -> str:
    return (
        f"checkpoints cannot be kept in {directory}: {error.strerror or error}; make it writable, "
        "or choose another --workdir"
    )


def absolute(path: str | epath.Path) -> epath.Path:
    """Makes `path` absolute, as Orbax requires. A bucket's URL (gs://...) is absolute already."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def choose_step(workdir: epath.Path, step: int | None, where: str = "") -> int:
    """Checks the checkpoint at `step`, or the newest one for None, and returns its step.

    `where` is the key or option that gave `step`, for errors. Nothing is written.

    Raises:
      UserError: there is no checkpoint, none at this step, or the checkpoint is damaged.
    """
    steps, prefix = saved_steps(workdir), f"{where}: " if where else ""
    if not steps:
        raise UserError(
            f"{prefix}{workdir} holds no checkpoint; give the workdir of a run that has saved one"
        )
    if step is not None and step not in steps:
        raise UserError(
            f"{prefix}{workdir} has no checkpoint of step {step} "
            f"(it has: {', '.join(map(str, steps))}); give one of these, or none for the newest"
        )
    chosen = workdir / "checkpoints" / str(steps[-1] if step is None else step)
    if what := checkpoint_files.damage(chosen, contents=False) or unreadable(chosen):
        raise checkpoint_files.damaged_error(chosen, what, prefix)
    return int(chosen.name)

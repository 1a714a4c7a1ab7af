"""Checkpoints in a workdir, with Orbax."""

from __future__ import annotations

import contextlib
import itertools
import logging
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from etils import epath

from vlp_jax.errors import CannotSave, UserError
from vlp_jax.files import is_remote
from vlp_jax.parallel import agreement
from vlp_jax.training import checkpoint_files
from vlp_jax.training.checkpoint_files import saved_steps
from vlp_jax.training.checkpoint_manager import (
    Manager,
    processes,
    quiet_failures,
    state_handler,
)
from vlp_jax.training.restore import Reader, unreadable
from vlp_jax.training.state import TrainState

# What Orbax and TensorStore raise when files cannot be written: OSError, ValueError with the
# system's words, RuntimeError from the threads that write.
SAVE_ERRORS = (OSError, ValueError, RuntimeError, TimeoutError)
_log = logging.getLogger("vlp_jax.training")
_openings = itertools.count()  # of managers, the same on all processes


class Checkpointer:
    """Saves states under `workdir/checkpoints/STEP` and gives back the newest.

    The checkpoint at step i holds all that is needed to go on with batch i: the state, and a
    small record of the input (`input_state.InputState`). Saving is asynchronous: `save` returns as
    soon as the arrays are on the host. A checkpoint appears under its final name only when it is
    whole, with checksums of its files. On opening, those that are not as they were written are set
    aside, from the newest on until one is sound.

    A save that fails, for want of room above all, is told and does not end the run, unless it has
    to succeed (`finish`) or too many fail in a row.

    Args:
      keep_last: how many of the newest to keep.
      keep_every: also keep each whose step is a multiple of this; 0 for none.
      max_failed: saves that fail one after the other before the run ends.
      read_only: neither saves nor removes anything: for a workdir in which a run may be under way.
      tell: takes a line about what went wrong.

    Attributes:
      failed: how many saves have failed.
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
                    create=False,
                ),
            )
        except OSError as error:
            raise CannotSave(_no_place(self._directory, error)) from error

    def _make_directory(self) -> None:
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            probe = self._directory / f".write_test_{uuid.uuid4().hex}"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise CannotSave(_no_place(self._directory, error)) from error

    def _add_checksums(self) -> None:
        """Called in the background when all files of a checkpoint are written, on process 0."""
        step = self._writing
        for directory in [*checkpoint_files.unfinished(self._directory, step)] or [
            self._directory / str(step)  # in an object store, where folders have no other name
        ]:
            checkpoint_files.write_checksums(directory)

    def steps(self) -> list[int]:
        """Steps of all whole checkpoints, in order."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Step of the newest whole checkpoint; None if there is none."""
        return self._manager.latest_step()

    def save(self, step: int, state: TrainState, input_state: Mapping[str, Any]) -> None:
        """Saves `state`, just before batch `step`, unless that checkpoint exists already.

        All processes call it. What fails is told; see `finish`.

        Raises:
          CannotSave: too many saves have failed, one after the other.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        try:
            agreement.on_first(lambda: self._check_room(state))
        except UserError as error:
            self._note_failure(step, str(error))
            return
        self._barrier.renew()
        self._writing, error = step, None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(state), input=ocp.args.JsonSave(dict(input_state))
                ),
                force=True,
            )
        except SAVE_ERRORS as caught:
            error = caught
        failed = any(agreement.gather(error is not None))
        if failed or not self._asynchronous:
            self._settle(error)

    def poll(self) -> None:
        """Tells how a save ended that is over by now. All processes call it at the same step.

        Raises:
          CannotSave: as `save`.
        """
        if self._writing is not None:
            over = not self._manager.is_saving_in_progress()
            if all(agreement.gather(over)):
                self._settle(None)

    def wait(self) -> None:
        """Returns when nothing is being written any more. All processes call it.

        Raises:
          CannotSave: as `save`.
        """
        if self._writing is not None:
            self._settle(None)

    def finish(self, step: int) -> None:
        """Returns when the checkpoint of `step` is on disk.

        Raises:
          CannotSave: it is not, and will not be.
        """
        self.wait()
        if step not in self.steps():
            newest = self.latest_step()
            kept = "no checkpoint is kept" if newest is None else f"the newest is of step {newest}"
            raise CannotSave(
                f"the checkpoint of step {step} could not be saved in {self._directory}, {kept}; "
                "make room or mend the disk, and run the same command to go on from there"
            )

    def _settle(self, error: Exception | None) -> None:
        """Waits for the save that is under way, and has all processes agree on how it ended."""
        step = self._writing  # the background needs it until it is done
        try:
            self._manager.wait_until_finished()
        except SAVE_ERRORS as caught:
            error = error or caught
        self._writing = None
        if error is not None:
            self._barrier.fail(str(error))
        reasons = agreement.gather(None if error is None else _first_line(error))
        failed = [f"process {i}: {text}" for i, text in enumerate(reasons) if text is not None]
        if not failed:
            self._in_a_row = 0
            return
        self._reopen(step)
        self._note_failure(step, failed[0].removeprefix("process 0: "))

    def _reopen(self, step: int) -> None:
        """Begins anew after a failure, which an open manager would tell for ever."""
        with contextlib.suppress(*SAVE_ERRORS):  # told already
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
        """Raises UserError if there is certainly no room, before half of a checkpoint is written;
        so too if the directory cannot be looked at.

        Numbers are compressed, so that less may do than they take in memory: most of what the
        newest checkpoint took is asked for.
        """
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
        """Step of the newest checkpoint, whose state `restore` can put into `abstract`; 0 if none.

        Raises:
          UserError: the checkpoint holds other parameters; it names them with both shapes.
        """
        step = self.latest_step()
        if step is None:
            return 0
        self._reader(step, abstract)
        return step

    def restore(self, abstract: TrainState, step: int) -> TrainState:
        """The state at `step` as arrays laid out as `abstract` says.

        Args:
          abstract: one that `check_fits`.
          step: of a checkpoint that exists.
        """
        return self._reader(step, abstract).read()

    def _reader(self, step: int, abstract: TrainState) -> Reader:
        return Reader.of(self._directory / str(step) / "state", abstract)

    def input_state(self, step: int) -> dict[str, Any]:
        """The record of the input in the checkpoint at `step`, which exists."""
        args = ocp.args.Composite(input=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args).input

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        """Finishes what is being written; a job that fails does not wait for its other processes.

        A single process that fails still finishes it, since it may be the best that there is.
        """
        if kind is None or jax.process_count() == 1 or issubclass(kind, UserError):
            self._manager.close()


def mend(checkpoints: epath.Path) -> list[str]:
    """Sets aside the newest checkpoints as long as they are damaged; a line about each.

    Those that were being written when a run ended are removed by Orbax on opening.

    Raises:
      UserError: all are damaged. They stay where they are.
    """
    if not checkpoints.exists():
        return []
    damaged = {entry: "it is no folder" for entry in checkpoint_files.not_checkpoints(checkpoints)}
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


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


def absolute(path: str | epath.Path) -> epath.Path:
    """`path` from the root, as Orbax wants it; one on a bucket (gs://...) is so already."""
    path = epath.Path(path)
    return path if is_remote(path) else path.resolve()


def choose_step(workdir: epath.Path, step: int | None, where: str = "") -> int:
    """`step`, or for None the step of the newest checkpoint in `workdir`. Nothing is written.

    Args:
      where: the key or option that says so, for the message.

    Raises:
      UserError: there is no checkpoint, none of this step, or files of it are not there, or not
        whole.
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

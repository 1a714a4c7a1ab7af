"""The files of a checkpoint: checksums, tests for damage, and setting damaged ones aside."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator

import google_crc32c
import jax
import orbax.checkpoint as ocp
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote, write_whole

CHECKSUMS = "checksums.json"
# Without these Orbax finds nothing in a checkpoint.
REQUIRED = ("state/_METADATA", "state/manifest.ocdbt", "input/metadata")
# Orbax writes times to _CHECKPOINT_METADATA after the checksums were taken. No state is in it.
_NOT_CHECKED = (CHECKSUMS, "_CHECKPOINT_METADATA")
SET_ASIDE = "damaged"  # the folder beside the checkpoints
# Bytes: a replicated array is written in slices by several devices only if each is this large.
SMALLEST_SLICE = 4 << 20
_READ_BYTES = 1 << 22  # at once, for a checksum
_TEMPORARY = re.compile(r"(\d+)\.orbax-checkpoint-tmp.*")


def check_path(workdir: epath.PathLike) -> None:
    """Raises UserError for a path that Orbax takes for a pattern or TensorStore splits."""
    if found := [sign for sign in "[\\" if sign in os.fspath(workdir)]:
        raise UserError(
            f"workdir {workdir} has {found[0]!r} in its path, where no checkpoint can be read; "
            "choose another --workdir, or move it"
        )


def write_checksums(directory: epath.Path) -> None:
    """Writes `checksums.json`: size and CRC-32C (RFC 3720) of every file of state and input.

    For an object store, which checks its objects itself, it holds sizes alone.

    Raises:
      OSError: a file is missing, or cannot be read or written.
    """
    with_sums = not is_remote(directory)
    record = {
        name: [size, _crc32c(directory / name) if with_sums else None]
        for name, size in _files(directory)
    }
    if missing := [name for name in REQUIRED if name not in record]:
        raise OSError(f"{missing[0]} was not written")
    write_whole(directory / CHECKSUMS, json.dumps(record))


def damage(directory: epath.Path, *, contents: bool = True) -> str | None:
    """Describes the damage to a checkpoint's files; None if there is none.

    Without `checksums.json` only missing files are noticed; `restore.unreadable` then tells more.
    `contents` compares checksums too, which reads every file; else sizes alone.

    Raises:
      UserError: this user may not read the files.
    """
    try:
        if not directory.is_dir():
            return "it is no folder"
        found = dict(_files(directory))
        missing = [name for name in REQUIRED if name not in found]
        if missing:
            return f"{missing[0]} is missing"
        if not (directory / CHECKSUMS).exists():
            return None
        record = _read_checksums(directory)
    except PermissionError as error:
        raise UserError(
            f"the checkpoint {directory} cannot be read ({error.strerror}: {error.filename}); give "
            "this user the right to read it"
        ) from None
    except (OSError, ValueError) as error:
        return f"{directory / CHECKSUMS} cannot be read: {error}"
    for name, (size, crc) in record.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != size:
            return f"{name} has {found[name]:,} bytes and not {size:,}"
        try:
            # An object store has no checksums here (see `write_checksums`).
            if contents and crc is not None and _crc32c(directory / name) != crc:
                return f"{name} has other contents than were written"
        except OSError as error:
            return f"{name} cannot be read: {error}"
    return None


def _read_checksums(directory: epath.Path) -> dict[str, tuple[int, str | None]]:
    """Reads path -> (size, CRC-32C or None); ValueError if `write_checksums` did not write it."""
    record = json.loads((directory / CHECKSUMS).read_text())
    if not isinstance(record, dict) or not all(
        isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], int)
        for entry in record.values()
    ):
        raise ValueError("it does not list files with their sizes and checksums")
    if missing := [name for name in REQUIRED if name not in record]:
        raise ValueError(f"it does not list {missing[0]}")
    return record


def saved_steps(workdir: epath.Path) -> list[int]:
    """Returns the steps of all complete checkpoints in `workdir`, in order. Writes nothing."""
    folder = workdir / "checkpoints"
    # Orbax lists a folder "004" as step 4, and then fails to open it as "4".
    return sorted(s for s in ocp.utils.checkpoint_steps(folder) if (folder / str(s)).exists())


def damaged_error(directory: epath.Path, what: str, where: str = "") -> UserError:
    """Makes the error of a command that only reads (`where`: its option): what to take instead."""
    workdir = directory.parent.parent
    others = [step for step in saved_steps(workdir) if step != int(directory.name)]
    # Sizes alone: an error message is not worth reading every checkpoint.
    sound = [s for s in others if damage(directory.parent / str(s), contents=False) is None]
    instead = f"take step {sound[-1]} instead" if sound else "there is no other sound one"
    name = f"the checkpoint of step {directory.name} in {workdir}"
    return UserError(f"{where}{name} is damaged ({what}); {instead}")


def set_aside(directory: epath.Path) -> epath.Path:
    """Moves a damaged checkpoint beside the others and returns its path; UserError if it cannot."""
    parent = directory.parent.parent / SET_ASIDE
    target = parent / f"{directory.name}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        parent.mkdir(parents=True, exist_ok=True)
        return directory.rename(target)
    except OSError as error:
        raise UserError(
            f"the damaged checkpoint {directory} cannot be moved to {target}: "
            f"{error.strerror or error}; move it out of the way"
        ) from error


def unfinished(checkpoints: epath.Path, step: int) -> Iterator[epath.Path]:
    """Yields the temporary folders in which a checkpoint of `step` was being written."""
    for entry in checkpoints.iterdir():
        match = _TEMPORARY.fullmatch(entry.name)
        if match and int(match[1]) == step:
            yield entry


def size_of(directory: epath.Path) -> int:
    """Returns the bytes of all files below `directory`."""
    return sum(size for _, size in _files(directory))


def free_bytes(directory: epath.Path) -> int | None:
    """Returns the free bytes on the disk of `directory`; None for an object store."""
    return None if is_remote(directory) else shutil.disk_usage(os.fspath(directory)).free


def _files(directory: epath.Path) -> Iterator[tuple[str, int]]:
    """Yields (path below `directory`, bytes) of every file that has a checksum, sorted."""
    for entry in sorted(directory.iterdir()):
        if entry.is_dir():
            for name, size in _files(entry):
                yield f"{entry.name}/{name}", size
        elif entry.name not in _NOT_CHECKED:
            yield entry.name, entry.stat().length


def _crc32c(file: epath.Path) -> str:
    total = google_crc32c.Checksum()
    with file.open("rb") as stream:
        while block := stream.read(_READ_BYTES):
            total.update(block)
    return total.hexdigest().decode()


# Orbax as it is used here: without preemption and without collectives.


def state_handler(several: ocp.options.MultiprocessingOptions) -> ocp.PyTreeCheckpointHandler:
    """Makes the Orbax handler that reads and writes the state.

    Orbax has each device that holds a copy of a replicated array write a slice of it, and JAX
    compiles a program for each shape of a slice. That pays for large arrays alone.
    """
    one_cpu = jax.process_count() == 1 and jax.default_backend() == "cpu"
    arrays = ocp.type_handlers.ArrayHandler(
        use_replica_parallel=not one_cpu, min_slice_bytes_for_replica_parallel=SMALLEST_SLICE
    )
    known = ocp.type_handlers
    handlers = {kind: known.get_type_handler(kind) for kind in known.supported_types()}
    registry = known.create_type_handler_registry(*{**handlers, jax.Array: arrays}.items())
    return ocp.PyTreeCheckpointHandler(
        multiprocessing_options=several, type_handler_registry=registry
    )


class Manager(ocp.CheckpointManager):
    """A `CheckpointManager` that never asks JAX about preemption: `vlp_jax.signals` does."""

    def reached_preemption(self, step: int) -> bool:
        """Returns False."""
        del step
        return False


def processes(opening: int) -> ocp.options.MultiprocessingOptions:
    """Makes Orbax synchronize processes through JAX's coordination service.

    By default it uses collectives on the devices, which get mixed up with a step under way.
    `opening`, the number of this manager, is part of the barriers' names: after a save that failed
    on some processes alone, Orbax's own numbers differ.
    """
    if jax.process_count() == 1:
        return ocp.options.MultiprocessingOptions()
    return ocp.options.MultiprocessingOptions(
        primary_host=0,
        active_processes=set(range(jax.process_count())),
        barrier_sync_key_prefix=f"vlp_jax_{opening}",
    )


def quiet_failures() -> None:
    """Silences the stacks that asyncio and Orbax log for each array of a save that fails."""
    for name in ("asyncio", "absl"):
        logger = logging.getLogger(name)
        if not any(isinstance(each, _FailedSaveFilter) for each in logger.filters):
            logger.addFilter(_FailedSaveFilter())


class _FailedSaveFilter(logging.Filter):
    """Drops the log records of asyncio and Orbax about a failed save."""

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name == "asyncio":
            return "exception was never retrieved" not in record.getMessage()
        return "orbax" not in record.pathname or record.levelno < logging.ERROR

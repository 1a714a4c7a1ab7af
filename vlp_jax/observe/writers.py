"""Writers of the numbers, images and texts of a run: metrics.jsonl, TensorBoard, W&B.

A writer is opened with the step at which the run (re)starts. An interrupted run writes its records
of later steps again. So a writer forgets them on opening, and every step is there once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote, write_whole
from vlp_jax.observe.jsonl import (
    METRICS_FILE,
    Images,
    JsonlWriter,
    Scalars,
    Texts,
)

_ROOM_BYTES = 1 << 24  # more than pictures of one step take
_log = logging.getLogger("vlp_jax.observe")
_WANDB_MODES = ("online", "offline")


class Writer(Protocol):
    """The methods of a writer. Values of one step may come in several calls."""

    def write_scalars(self, step: int, scalars: Scalars) -> None: ...
    def write_images(self, step: int, images: Images) -> None: ...
    def write_text(self, step: int, texts: Texts) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


def _to_each(name: str) -> Callable[..., None]:
    """Makes the method of `MultiWriter` that calls the method `name` of each writer."""

    def call(self: MultiWriter, *arguments: Any) -> None:
        for writer in self.writers:
            getattr(writer, name)(*arguments)

    return call


class MultiWriter:
    """Passes every call on to each of `writers`, in order."""

    def __init__(self, writers: Sequence[Writer]):
        self.writers = tuple(writers)

    write_scalars = _to_each("write_scalars")
    write_images = _to_each("write_images")
    write_text = _to_each("write_text")
    flush = _to_each("flush")

    def close(self) -> None:
        """Closes all of them, also when one fails; the failure is raised afterwards."""
        with contextlib.ExitStack() as stack:
            # The stack calls the last one first, so reversed means in order.
            for writer in reversed(self.writers):
                stack.callback(writer.close)


class NullWriter(MultiWriter):
    """Writes nothing: for every process but the first, and for runs that keep no record."""

    def __init__(self) -> None:
        super().__init__(())


class TensorBoardWriter:
    """Event files for TensorBoard by tensorboardX, without TensorFlow.

    Event files are append-only: on opening, an event is written that makes TensorBoard hide what
    earlier files say of steps >= `start_step`. On a full disk nothing is written, and this is told
    once: the thread in which tensorboardX writes would not survive the error.

    Raises:
        UserError: `directory` is not local, or tensorboardX is not installed.
    """

    def __init__(self, directory: epath.PathLike, start_step: int = 0):
        if is_remote(directory):
            raise UserError(
                f"TensorBoard files need a local directory, not {os.fspath(directory)}: "
                "set writers.tensorboard=false, or use a local workdir"
            )
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "writers.tensorboard is on but tensorboardX is not installed: "
                "`pip install tensorboardX`, or set writers.tensorboard=false"
            ) from error
        self._directory, self._told = os.fspath(directory), False
        # tensorboardX names files by the second; the suffix keeps a quick restart from overwriting.
        self._writer = tensorboardX.SummaryWriter(
            os.fspath(directory), purge_step=start_step, filename_suffix=f".from_step_{start_step}"
        )

    def _has_room(self) -> bool:
        room = shutil.disk_usage(self._directory).free > _ROOM_BYTES
        if not room and not self._told:
            _log.warning("nothing more is written to %s: the disk is full", self._directory)
        self._told = not room
        return room

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        for name, value in scalars.items() if self._has_room() else ():
            self._writer.add_scalar(name, float(value), global_step=step)

    def write_images(self, step: int, images: Images) -> None:
        for name, image in images.items() if self._has_room() else ():
            self._writer.add_image(name, _checked_image(name, image), step, dataformats="HWC")

    def write_text(self, step: int, texts: Texts) -> None:
        for name, text in texts.items() if self._has_room() else ():
            self._writer.add_text(name, text, global_step=step)

    def flush(self) -> None:
        if self._has_room():
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class WandbWriter:
    """A Weights & Biases run, continued by later processes of the same workdir.

    The run's id lives in `directory`/wandb_run_id.txt. wandb cannot take rows back, so after a
    resume the replayed steps are there twice. Our step is the metric "step", the x axis of every
    chart. Offline, `wandb sync` of all the offline-run-* folders makes one run.

    Args:
        directory: the workdir; local runs keep wandb's files in `directory`/wandb.
        project, name: as wandb shows them; name None lets wandb choose.
        config: the resolved config, as a plain nested dict.
        start_step: logged as "start_step" so that resumes are visible.
        mode: "online", or "offline", which uses no network.

    Raises:
        UserError: wandb is not installed, has no login, cannot be reached, or mode is unknown.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        project: str,
        name: str | None,
        config: Mapping[str, Any],
        start_step: int = 0,
        mode: str = "online",
    ):
        wandb = _import_wandb(mode)
        self._image = wandb.Image
        directory = epath.Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        try:
            self._run = wandb.init(
                project=project,
                name=name,
                config=dict(config),
                id=_wandb_run_id(directory),
                resume="allow",
                dir=None if is_remote(directory) else os.fspath(directory),
                mode=mode,
                # The progress line owns the terminal, and captured output would hold its redraws.
                settings=wandb.Settings(console="off", silent=mode == "offline"),
            )
        except wandb.errors.Error as error:
            message = " ".join(str(error).split())
            raise UserError(
                f"wandb could not start a run of project {project!r} ({message}): run "
                "`wandb login`, or set writers.wandb.mode=offline and `wandb sync` later"
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        self._run.log({"step": start_step, "start_step": start_step})

    def write_scalars(self, step: int, scalars: Scalars) -> None:
        values = {name: float(value) for name, value in scalars.items()}
        self._run.log({"step": step, **values})

    def write_images(self, step: int, images: Images) -> None:
        wrapped = {name: self._image(_checked_image(name, image)) for name, image in images.items()}
        self._run.log({"step": step, **wrapped})

    def write_text(self, step: int, texts: Texts) -> None:
        self._run.log({"step": step, **texts})

    def flush(self) -> None:
        """Does nothing: wandb's own process already has every row that was logged."""

    def close(self) -> None:
        self._run.finish()


def check_writers(config: Mapping[str, Any]) -> None:
    """Raises UserError for a config that `build_writers` would refuse; writes nothing."""
    if config["wandb"]["enabled"]:
        _import_wandb(config["wandb"]["mode"])


def _import_wandb(mode: str) -> Any:
    """Imports the library; UserError if it is not installed, or has no such mode."""
    if mode not in _WANDB_MODES:
        raise UserError(f"writers.wandb.mode is {mode!r}: use one of {', '.join(_WANDB_MODES)}")
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "writers.wandb is enabled but wandb is not installed: "
            "`pip install wandb`, or set writers.wandb.enabled=false"
        ) from error
    return wandb


def build_writers(
    config: Mapping[str, Any],
    workdir: epath.PathLike,
    start_step: int,
    resolved_config: Mapping[str, Any],
) -> Writer:
    """Opens metrics.jsonl and the writers of `config.writers`; none on processes but the first.

    Args:
        workdir: metrics.jsonl, tensorboard/ and wandb's files are made in here.
        start_step: the step of the restored checkpoint, or 0.
        resolved_config: the whole config of the run, for wandb to show.

    Raises:
        UserError: a writer that cannot work here.
    """
    import jax

    check_writers(config)
    if jax.process_index() != 0:
        return NullWriter()
    workdir, wandb = epath.Path(workdir), config["wandb"]
    writers: list[Writer] = []
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: MultiWriter(writers).close())  # if a later one cannot be opened
        writers.append(JsonlWriter(workdir / METRICS_FILE, start_step))
        if config["tensorboard"]:
            writers.append(TensorBoardWriter(workdir / "tensorboard", start_step))
        if wandb["enabled"]:
            chosen = wandb["project"], wandb["name"], resolved_config, start_step, wandb["mode"]
            writers.append(WandbWriter(workdir, *chosen))
        stack.pop_all()  # all are open: from here on the caller closes them
    return MultiWriter(writers)


def _checked_image(name: str, image: np.ndarray) -> np.ndarray:
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(
            f"image {name!r} must be uint8 of shape (height, width, 3), "
            f"not {image.dtype} of shape {image.shape}"
        )
    return image


def _wandb_run_id(directory: epath.Path) -> str:
    """Returns the id of this workdir's wandb run, which is made on first use."""
    path = directory / "wandb_run_id.txt"
    if not path.exists():
        write_whole(path, uuid.uuid4().hex[:12] + "\n")
    return path.read_text().strip()

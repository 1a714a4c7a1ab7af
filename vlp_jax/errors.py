"""The exceptions that end a command with one line, and the exit statuses of all commands."""

from __future__ import annotations

import difflib
import enum
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class ExitStatus(enum.IntEnum):
    """How a command ended (numbers of sysexits.h). Launchers restart a run after all but two."""

    COMPLETE = 0
    MISTAKE = 2  # a mistake of the user, which a restart would repeat
    NOT_FINITE = 65  # EX_DATAERR: loss or gradient not finite, several steps in a row
    HANG = 70  # EX_SOFTWARE: no progress; the watchdog ended the process
    CANNOT_SAVE = 74  # EX_IOERR: checkpoints cannot be written
    PREEMPTED = 75  # EX_TEMPFAIL: told to stop; a run has saved its state before
    PEER_LOST = 76  # EX_PROTOCOL: another process of the job is gone


class UserError(Exception):
    """A mistake in a config, a command line, a file or a workdir, which the user can mend.

    Its message is one line: what is wrong, where, and what to do about it. The entry points print
    it to stderr and exit with `status`. Every other exception is a defect of this package.
    """

    status = ExitStatus.MISTAKE


class NotFinite(UserError):
    """Losses or gradients were not finite for too many steps in a row."""

    status = ExitStatus.NOT_FINITE


class NoScores(UserError):
    """An evaluator cannot score its data, on every process alike. A training run goes on."""


class CannotSave(UserError):
    """A checkpoint that a run depends on could not be written."""

    status = ExitStatus.CANNOT_SAVE


class PeerLost(UserError):
    """Another process of the job is missing. It may be late, so starting again can help."""

    status = ExitStatus.PEER_LOST


class Preempted(UserError):
    """The run was told to stop and can be resumed by the same command."""

    status = ExitStatus.PREEMPTED


def error_of_status(status: int) -> type[UserError]:
    """Returns the kind of `UserError` that has this exit status."""
    kinds = {kind.status: kind for kind in UserError.__subclasses__()}
    kinds[ExitStatus.MISTAKE] = UserError
    return kinds.get(status, UserError)


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message; the name of its type if it has none."""
    text = str(error.args[0] if len(error.args) == 1 else error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__


# Names that people type first -> the name here.
OTHER_NAMES = {
    "lr": "learning_rate",
    "wd": "weight_decay",
    "warmup_steps": "warmup",
    "siglip": "sigmoid",
    "clip": "softmax",
    "infonce": "softmax",
    "num_layers": "depth",
    "layers": "depth",
    "hidden_size": "width",
    "num_heads": "heads",
    "resolution": "image_size",
    "max_length": "context_length",
}
IMAGE_KEYS = ("patch_size", "image_size")  # keys of an objective's section `image`


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error about a name that is not known: the nearest known one, and all."""
    known = sorted(known)
    nearest = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    if OTHER_NAMES.get(name) in known:
        nearest = [OTHER_NAMES[name]]
    if name in IMAGE_KEYS and "image" in known:
        nearest = [f"image.{name}"]
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"{hint} (known: {', '.join(known)})"


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """One line that says `key` is not known in `where`, and which known key is nearest."""
    return f"unknown key {key!r} in {where}{did_you_mean(key, known)}"


def check_arguments(constructor: Callable[..., Any], arguments: Iterable[str], where: str) -> None:
    """Raises UserError for an argument that `constructor` does not take, or that is missing."""
    parameters, arguments = inspect.signature(constructor).parameters, set(arguments)
    for key in sorted(arguments - set(parameters)):
        raise UserError(unknown_key_message(key, parameters, where))
    for key, parameter in parameters.items():
        if key not in arguments and parameter.default is parameter.empty:
            raise UserError(f"{where} needs {key}")

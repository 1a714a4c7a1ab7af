"""The exceptions that end a command with one line, and the exit statuses of all commands."""

from __future__ import annotations

import difflib
import enum
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class ExitStatus(enum.IntEnum):
    """How a command ended. The launchers restart a run, except after the first two.

    The numbers are from sysexits.h where it has one that fits.
    """

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
    the line to stderr and exit with `status`. Every other exception is a defect of this package and
    keeps its traceback.
    """

    status = ExitStatus.MISTAKE


class NotFinite(UserError):
    """Losses or gradients were not finite for too many steps in a row."""

    status = ExitStatus.NOT_FINITE


class NoScores(UserError):
    """An evaluator cannot score its data. Every process raises it alike.

    It ends an evaluation command; a training run prints it and goes on.
    """


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


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """Makes the line of an error about an unknown key in `where`; it suggests the nearest key."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {key!r} in {where}{hint} (known: {', '.join(known)})"


def check_arguments(constructor: Callable[..., Any], arguments: Iterable[str], where: str) -> None:
    """Raises UserError for an argument that `constructor` does not take, or that is missing."""
    parameters, arguments = inspect.signature(constructor).parameters, set(arguments)
    for key in sorted(arguments - set(parameters)):
        raise UserError(unknown_key_message(key, parameters, where))
    for key, parameter in parameters.items():
        if key not in arguments and parameter.default is parameter.empty:
            raise UserError(f"{where} needs {key}")

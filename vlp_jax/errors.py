"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable
from typing import Any


class UserError(Exception):
    """A mistake in a config, a command line, a file or a workdir that the user can mend.

    Its message is one line: what is wrong, where, and what to do about it. The entry points print
    that line to stderr and exit with status 2; anything else that is raised is a defect of ours and
    keeps its traceback.
    """


def unknown_key_message(key: str, known: Iterable[str], where: str) -> str:
    """One line that says `key` is not known in `where`, and which known key is nearest."""
    known = sorted(known)
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
    return f"unknown key {key!r} in {where}{hint} (known: {', '.join(known)})"


def check_arguments(constructor: Callable[..., Any], arguments: Iterable[str], where: str) -> None:
    """Raises UserError for an argument that `constructor` does not take, or one that it lacks."""
    parameters, arguments = inspect.signature(constructor).parameters, set(arguments)
    for key in sorted(arguments - set(parameters)):
        raise UserError(unknown_key_message(key, parameters, where))
    for key, parameter in parameters.items():
        if key not in arguments and parameter.default is parameter.empty:
            raise UserError(f"{where} needs {key}")

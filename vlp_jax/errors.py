"""The one exception for mistakes that a user can mend."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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

"""How every command ends: its exit status, and the last line of stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import logging

from vlp_jax.errors import UserError
from vlp_jax.training.preemption import EXIT_RESTART, Preempted


def run_command(command: Callable[[], None]) -> int:
    """Runs `command` and returns the exit status: 0, 2 for a `UserError`, 75 if told to stop."""
    logging.set_verbosity(logging.WARNING)
    try:
        command()
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return EXIT_RESTART
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0

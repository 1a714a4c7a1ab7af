"""Runs a command and ends it in a uniform way: an exit status and a last line on stderr."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable

import jax
from absl import logging

from vlp_jax import signals
from vlp_jax.errors import ExitStatus, Preempted, UserError
from vlp_jax.parallel import startup

# Words in JAX's errors when another process of the job cannot be reached any more.
PEER_LOST_WORDS = ("gloo", "nccl", "heartbeat", "coordination", "unavailable", "peer", "barrier")


def run_command(command: Callable[[], None]) -> int:
    """Runs `command` and returns the exit status, one of `ExitStatus`.

    SIGTERM and Ctrl-C end the command with one line, see `vlp_jax.signals`. In a job of several
    processes, a process that fails exits at once, or it and the others would wait for each other.
    """
    logging.set_verbosity(logging.WARNING)
    startup.leave_out_missing_tpu()
    with signals.heard():
        status = _run(command)
        signals.leaving(status)
    return status


def _run(command: Callable[[], None]) -> int:
    try:
        command()
    except KeyboardInterrupt as stop:
        print(stop if stop.args else "told to stop: run the same command to go on", file=sys.stderr)
        return _leave(ExitStatus.PREEMPTED)
    except Preempted as stop:
        print(stop, file=sys.stderr)
        return stop.status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return _leave(error.status)
    except Exception as error:
        if _processes() == 1:
            raise  # Python prints the traceback and exits with status 1
        traceback.print_exc()
        lost = isinstance(error, jax.errors.JaxRuntimeError | TimeoutError) and any(
            word in str(error).lower() for word in PEER_LOST_WORDS
        )
        if lost:
            print("error: another process of this job was lost; start it again", file=sys.stderr)
        return _leave(ExitStatus.PEER_LOST if lost else 1)
    return ExitStatus.COMPLETE


def _leave(status: int) -> int:
    """Returns `status`; exits at once in a job of several, where JAX waits for the rest."""
    if _processes() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status


def _processes() -> int:
    # jax.process_count() alone would start JAX's backend, and so take the devices.
    return jax.process_count() if jax.distributed.is_initialized() else 1

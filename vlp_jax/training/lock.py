"""Locks a workdir, so that only one run at a time writes to it."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote
from vlp_jax.parallel import agreement

LOCK = "run.lock"
_log = logging.getLogger("vlp_jax.training")


@contextmanager
def locked(workdir: epath.Path) -> Iterator[None]:
    """Locks the workdir for this job while the context is open. All its processes must enter it.

    Process 0 holds an flock on a file in the workdir. The operating system releases it when the
    process ends, however it ends. The file stays behind without effect. An object store has no
    locks, so a workdir there is not locked.

    Raises:
      UserError: another job holds the lock; the message names its host and process.
    """
    held = agreement.on_first(lambda: None if is_remote(workdir) else _take(workdir))
    try:
        yield
    finally:
        if held is not None and jax.process_index() == 0:
            os.close(held)


def _take(workdir: epath.Path) -> int:
    """Takes the lock, and returns the descriptor of the open file that holds it."""
    workdir.mkdir(parents=True, exist_ok=True)
    file = os.open(os.fspath(workdir / LOCK), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(file, 1000).decode(errors="replace").strip() or "unknown"
        os.close(file)
        raise UserError(
            f"workdir {workdir} is in use by another run ({_described(owner)}); stop that one "
            "first, or choose another --workdir"
        ) from None
    except OSError as error:  # some network file systems have no locks
        _log.warning("workdir %s cannot be locked (%s): see to it yourself", workdir, error)
    # Only now: until the lock is held, the file names the run that holds it.
    os.ftruncate(file, 0)
    note = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.time()}
    os.write(file, json.dumps(note).encode())
    return file


def _described(owner: str) -> str:
    try:
        note = json.loads(owner)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(note["since"]))
        return f"process {note['pid']} on {note['host']}, since {since}"
    except (ValueError, KeyError, TypeError):
        return owner

"""One run at a time in a workdir."""

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
    """Holds the workdir for this job while the context is open. All processes of the job enter it.

    The lock is the operating system's (flock), on a file of the workdir that process 0 keeps open:
    it ends with the process however that ends, and the file that stays behind means nothing. An
    object store has no such lock; there nothing is held.

    Raises:
      UserError: another job holds it; the message says which.
    """
    held = agreement.on_first(lambda: None if is_remote(workdir) else _take(workdir))
    try:
        yield
    finally:
        if held is not None and jax.process_index() == 0:
            os.close(held)


def _take(workdir: epath.Path) -> int:
    """The open file that holds the lock."""
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
    except OSError as error:  # a file system without locks
        _log.warning("workdir %s cannot be locked (%s): see to it yourself", workdir, error)
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

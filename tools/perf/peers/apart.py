"""A peer in a process of its own, started as its users start it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, Self

from tools.perf.result import Contender

# Variables that ours are started with, or set, and others are not.
OURS_ALONE = ("GLIBC_TUNABLES", "PJRT_NPROC", "JAX_NUM_CPU_DEVICES")


class ApartPeer:
    """A `Contender` whose steps run in another process, which waits while others have their turn.

    As a context manager it ends that process.

    Args:
      command: starts `serve` with the peer; it gets the environment of this process without the
        variables of `OURS_ALONE`.

    Raises:
      RuntimeError: the process ended; with its last words.
    """

    def __init__(self, name: str, command: Sequence[str]):
        environment = {k: v for k, v in os.environ.items() if k not in OURS_ALONE}
        # A pipe that nobody reads fills up and stops the peer.
        self._errors = tempfile.TemporaryFile(mode="w+")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        self.name = name
        try:
            told = self._receive()
        except BaseException:  # Ctrl-C as well: no process is left behind
            self.__exit__()
            raise
        removed = [k for k in OURS_ALONE if k in os.environ]
        without = f", without {', '.join(removed)}, which ours has" if removed else ""
        self.notes = (f"in a process of its own{without}", *told["notes"])
        self.facts: dict[str, Any] = told["facts"]

    def run(self, steps: int) -> list[float]:
        """Trains `steps` steps there; returns the seconds of each."""
        try:
            print(steps, file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise RuntimeError(self._last_words()) from None
        told = self._receive()
        self.facts.update(told["facts"])
        return told["seconds"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()  # it writes nothing that could be left half done
        self._process.communicate()
        self._errors.close()

    def _receive(self) -> dict[str, Any]:
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(self._last_words())
        try:
            return json.loads(line)
        except ValueError as error:
            raise RuntimeError(f"it printed {line[:100]!r} instead of an answer") from error

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return f"its process ended with status {status}" + (f": {lines[-1]}" if lines else "")


class Channel:
    """The peer's end: numbers of steps come on stdin, measurements go to stdout.

    Everything else that is printed goes to stderr. Make it before anything can print.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(sys.stdout.fileno()), "w")
        # Libraries in C print to the descriptor itself, past `sys.stdout`.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def serve(self, peer: Contender) -> None:
        """Tells that `peer` is ready, and trains as many steps as stdin asks for, to its end."""
        self._tell(notes=peer.notes, facts=peer.facts)
        for line in sys.stdin:
            seconds = peer.run(int(line))
            self._tell(seconds=seconds, facts=peer.facts)

    def _tell(self, **content: Any) -> None:
        print(json.dumps(content), file=self._out, flush=True)

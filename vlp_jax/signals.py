"""Handles SIGTERM and Ctrl-C (SIGINT) from a command's first line to its last.

Python runs signal handlers on the main thread, between two bytecode instructions. So a handler does
not run while the main thread compiles or waits for a device. Therefore a second thread listens as
well: the interpreter writes the number of each signal to a pipe (`signal.set_wakeup_fd`), and the
thread reads the pipe.
"""

from __future__ import annotations

import contextlib
import enum
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType

from vlp_jax.errors import ExitStatus

TOLD_BY = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}
STOP_SECONDS = 5.0  # time for the main thread to stop; a spot machine has 30 seconds in all
# Within this time a second Ctrl-C is the same one: a terminal sends it to the program and to its
# launcher, which passes it on.
AGAIN_SECONDS = 1.0
REPEAT_SECONDS = 0.02  # by then the main thread has left the destructor


class ToldToStop(KeyboardInterrupt):
    """Raised in the main thread when the signal `number` arrives.

    It is a subclass of KeyboardInterrupt for a reason. Once a plain KeyboardInterrupt has left code
    compiled by `exec`, as in dataclasses, Python exits with the status of an interrupt, even if the
    exception was caught.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_line(number))
        self.number = number


class Reaction(enum.Enum):
    """The reaction to a signal."""

    LEAVE = "ends the process: its command has not begun, or is complete"
    END = "raises ToldToStop once, and ends the process if that takes too long"
    RAISE = "raises ToldToStop once"
    NOTE = "only sets `told`: the training loop polls it, saves and stops"


class Listener:
    """Receives the signals of this process, and sets `told` at the first."""

    def __init__(self) -> None:
        self.told = threading.Event()
        self.reaction = Reaction.LEAVE
        self._status: int | None = None  # exit status of a complete command
        self._lock = threading.Lock()  # never taken by a handler, which may interrupt its holder
        self._ends = threading.Lock()
        self._timer: threading.Timer | None = None
        self._told_at = 0.0
        self._raised = False
        self._repeats: list[int] = []  # signals that this process has sent to itself, not to count

    def open(self) -> None:
        """Installs the handlers and starts the thread. Must run on the main thread."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_main_thread) for number in TOLD_BY}
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._on_lost_exception
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Restores the previous handlers and ends the thread."""
        self.give_back(self._pipe_before)
        self.react(Reaction.NOTE)  # signals still in the pipe must not end the process
        os.write(self._write, b"\0")  # no signal has this number: the thread ends

    def give_back(self, pipe: int) -> None:
        """Restores the previous handlers; `pipe` is the interpreter's new wakeup descriptor."""
        signal.set_wakeup_fd(pipe)
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def react(self, reaction: Reaction) -> None:
        """Sets the reaction to the next signal."""
        with self._lock:
            self.reaction = reaction
            if reaction is Reaction.NOTE:
                self._stop_timer()

    def leaving(self, status: int) -> None:
        """Notes that the command is complete, and its exit status."""
        self._status, self.reaction = status, Reaction.LEAVE

    def _on_main_thread(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.reaction in (Reaction.END, Reaction.RAISE) and not self._raised:
            self._raised = True
            raise ToldToStop(number)

    def _on_lost_exception(self, lost: sys.UnraisableHookArgs) -> None:
        """Repeats a signal whose ToldToStop was lost in a destructor, which cannot raise."""
        if not isinstance(lost.exc_value, ToldToStop):
            self._hook_before(lost)
            return
        number, self._raised = lost.exc_value.number, False
        self._repeats.append(number)
        main = threading.main_thread().ident
        again = threading.Timer(REPEAT_SECONDS, signal.pthread_kill, (main, number))
        again.daemon = True
        again.start()

    def _listen(self) -> None:
        while True:
            for number in os.read(self._read, 64):
                if not number:
                    os.close(self._read)
                    os.close(self._write)
                    return
                if number in self._repeats:
                    self._repeats.remove(number)
                elif number in TOLD_BY:
                    self._hear(number)

    def _hear(self, number: int) -> None:
        with self._lock:
            now, first = time.monotonic(), not self.told.is_set()
            if first:
                self._told_at, self.number = now, number
                self.told.set()
            # The main thread may be faster: its handler raised, and the command is over already.
            left = self.reaction is Reaction.LEAVE and self._raised
            if first and (left or self.reaction is Reaction.END):
                self._timer = threading.Timer(STOP_SECONDS, self._end, (number,))
                self._timer.daemon = True
                self._timer.start()
                return
            # A second SIGTERM means nothing new (schedulers repeat it); a second Ctrl-C is urgent.
            again = number == signal.SIGINT and now - self._told_at > AGAIN_SECONDS
            if again or self.reaction is Reaction.LEAVE:
                self._end(number)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, number: int) -> None:
        """Ends the process at once."""
        if not self._ends.acquire(blocking=False):
            return  # another thread is ending the process
        if self._status is None:
            # Not through sys.stderr, because the main thread may hold its lock.
            os.write(2, f"{_line(number)}\n".encode())
        os._exit(ExitStatus.PREEMPTED if self._status is None else self._status)


def _line(number: int) -> str:
    return f"told to stop ({TOLD_BY[number]}): run the same command to go on"


_listener: Listener | None = None


def listen() -> None:
    """Listens to signals until the process ends. Call it before the first slow import."""
    global _listener
    if _listener is None and threading.current_thread() is threading.main_thread():
        _listener = Listener()
        _listener.open()


def listen_if_started(package: str) -> None:
    """Listens if this process was started as `python -m PACKAGE...`, also while it imports."""
    name = re.compile(rf"(-\w*m)?{re.escape(package)}(\..+)?")
    if sys.argv[:1] == ["-m"] and any(map(name.fullmatch, sys.orig_argv)):
        listen()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Wraps a command: a signal raises ToldToStop within it.

    STOP_SECONDS later, or at a second Ctrl-C, the process is ended. See `noted` for a command that
    stops by itself. On a thread other than the main one it does nothing.
    """
    global _listener
    opened = _listener is None
    listen()
    if _listener is None:
        yield
        return
    _listener.react(Reaction.END)
    try:
        yield
    finally:
        if opened:
            _listener.close()
            _listener = None


def leaving(status: int) -> None:
    """Marks the command as complete: from now on a signal ends the process with `status`."""
    if _listener is not None:
        _listener.leaving(status)


@contextlib.contextmanager
def noted() -> Iterator[threading.Event]:
    """Returns an event that a signal sets; the signal has no other effect.

    Within a command (`heard`) this lasts until the command's end, and a second Ctrl-C ends the
    process. In another program the previous handlers are restored after the first signal.
    """
    if _listener is not None:
        _listener.react(Reaction.NOTE)
        yield _listener.told
        return
    told, before = threading.Event(), {}

    def restore() -> None:
        while before:
            signal.signal(*before.popitem())

    def receive(number: int, frame: FrameType | None) -> None:
        del number, frame
        told.set()
        restore()

    for number in TOLD_BY:
        before[number] = signal.signal(number, receive)
    try:
        yield told
    finally:
        restore()


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Makes signals raise ToldToStop again, within `noted`. An earlier signal raises at once."""
    if _listener is None or _listener.reaction is not Reaction.NOTE:
        yield
        return
    listener = _listener
    listener.react(Reaction.RAISE)
    try:
        if listener.told.is_set():
            raise ToldToStop(listener.number)
        yield
    finally:
        listener.react(Reaction.NOTE)


def _after_fork() -> None:
    """Restores the handlers in a forked child, which would write to its parent's pipe."""
    global _listener
    if _listener is not None:
        _listener.give_back(-1)
        _listener = None


os.register_at_fork(after_in_child=_after_fork)

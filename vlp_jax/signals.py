"""SIGTERM and Ctrl-C (SIGINT), heard from a command's first line to its last, whatever it does.

Python runs a signal's handler on the main thread, between two of its instructions: not while the
main thread compiles or waits for a device. So a thread of its own listens as well, through the pipe
that the interpreter writes the number of a signal to (`signal.set_wakeup_fd`).
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
STOP_SECONDS = 5.0  # for the main thread to end what it does; a spot machine has 30
# Ctrl-C in a terminal reaches a program itself and once more through what started it.
AGAIN_SECONDS = 1.0
REPEAT_SECONDS = 0.02  # by then the main thread is out of a destructor


class ToldToStop(KeyboardInterrupt):
    """Raised where the main thread is when a signal comes.

    Not KeyboardInterrupt itself: once Python has seen that one leave a text that was compiled by
    `exec`, as dataclasses do, it ends with the status of an interrupt, whoever caught it later.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(_line(number))
        self.number = number


class Reaction(enum.Enum):
    """The answer to being told to stop."""

    LEAVE = "ends the process: its command has not begun, or is through"
    END = "raises ToldToStop once, and ends the process if that takes too long"
    RAISE = "raises ToldToStop once"
    NOTE = "sets `told` and nothing else: whoever runs looks there and ends by itself"


class Listener:
    """Hears the signals of this process, while it is open.

    Attributes:
      told: set once a signal has come.
      number: of that signal.
    """

    def __init__(self) -> None:
        self.told = threading.Event()
        self._reaction = Reaction.LEAVE
        self._status: int | None = None  # of a command that is through
        self._lock = threading.Lock()  # never taken by a handler, which may interrupt its holder
        self._ends = threading.Lock()
        self._timer: threading.Timer | None = None
        self._told_at = 0.0
        self._raised = False
        self._repeats: list[int] = []  # signals that this process has sent to itself

    def open(self) -> None:
        """Takes the signals. On the main thread alone."""
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._pipe_before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._on_main_thread) for number in TOLD_BY}
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._on_lost_exception
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def close(self) -> None:
        """Gives the signals back."""
        self.give_back(self._pipe_before)
        self.reaction = Reaction.NOTE  # to what the thread has yet to read
        os.write(self._write, b"\0")  # no signal has this number: the thread ends

    def give_back(self, pipe: int) -> None:
        """Puts the handlers of before in place, and `pipe` where the interpreter writes to."""
        signal.set_wakeup_fd(pipe)
        sys.unraisablehook = self._hook_before
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @property
    def reaction(self) -> Reaction:
        """The answer to the next signal."""
        return self._reaction

    @reaction.setter
    def reaction(self, reaction: Reaction) -> None:
        with self._lock:
            self._reaction = reaction
            if reaction is Reaction.NOTE:
                self._stop_timer()

    def leaving(self, status: int) -> None:
        """Says that the command is through, and with which exit status."""
        self._status, self._reaction = status, Reaction.LEAVE

    def _on_main_thread(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._reaction in (Reaction.END, Reaction.RAISE) and not self._raised:
            self._raised = True
            raise ToldToStop(number)

    def _on_lost_exception(self, lost: sys.UnraisableHookArgs) -> None:
        """Raises again what came in a destructor or a callback of the garbage collector."""
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
            # The main thread may be faster, and have left its command because of this signal.
            left = self._reaction is Reaction.LEAVE and self._raised
            if first and (left or self._reaction is Reaction.END):
                self._timer = threading.Timer(STOP_SECONDS, self._end, (number,))
                self._timer.daemon = True
                self._timer.start()
                return
            # A scheduler may send SIGTERM twice: it says nothing new.
            again = number == signal.SIGINT and now - self._told_at > AGAIN_SECONDS
            if again or self._reaction is Reaction.LEAVE:
                self._end(number)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _end(self, number: int) -> None:
        """Ends the process at once."""
        if not self._ends.acquire(blocking=False):
            return  # another thread does
        if self._status is None:
            # Past Python's own stream, whose lock the main thread may hold.
            os.write(2, f"{_line(number)}\n".encode())
        os._exit(ExitStatus.PREEMPTED if self._status is None else self._status)


def _line(number: int) -> str:
    return f"told to stop ({TOLD_BY[number]}): run the same command to go on"


_listener: Listener | None = None


def listen() -> None:
    """Hears signals from now to the end of the process; before the first import that takes long."""
    global _listener
    if _listener is None and threading.current_thread() is threading.main_thread():
        _listener = Listener()
        _listener.open()


def listen_if_started(package: str) -> None:
    """Hears signals if this process is `python -m PACKAGE...`; one that imports it is left alone.

    Python imports the package before it runs the module in it, so that a package that calls this
    first hears what comes while all else is imported. Until then `sys.argv[0]` is "-m".
    """
    name = re.compile(rf"(-\w*m)?{re.escape(package)}(\..+)?")
    if sys.argv[:1] == ["-m"] and any(map(name.fullmatch, sys.orig_argv)):
        listen()


@contextlib.contextmanager
def heard() -> Iterator[None]:
    """Wraps a command: within it, being told to stop raises ToldToStop.

    After STOP_SECONDS, or at a second Ctrl-C, the process is ended. See `noted` for a command that
    stops by itself. Nothing changes on another thread than the main one.
    """
    global _listener
    opened = _listener is None
    listen()
    if _listener is None:
        yield
        return
    _listener.reaction = Reaction.END
    try:
        yield
    finally:
        if opened:
            _listener.close()
            _listener = None


def leaving(status: int) -> None:
    """Says that the command is through: a signal ends the process with `status` from now on."""
    if _listener is not None:
        _listener.leaving(status)


@contextlib.contextmanager
def noted() -> Iterator[threading.Event]:
    """The event that is set when the process is told to stop, and no other answer to it.

    Within a command it stays so to the command's end; a second Ctrl-C ends the process. In somebody
    else's program the handlers of before are back after the first signal.
    """
    if _listener is not None:
        _listener.reaction = Reaction.NOTE
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
    """Within `noted` of a command: raises ToldToStop if it is told to stop, or was."""
    if _listener is None or _listener.reaction is not Reaction.NOTE:
        yield
        return
    listener = _listener
    listener.reaction = Reaction.RAISE
    try:
        if listener.told.is_set():
            raise ToldToStop(listener.number)
        yield
    finally:
        listener.reaction = Reaction.NOTE


def _after_fork() -> None:
    """Lets a child, which has its parent's handlers and pipe, not speak for its parent."""
    global _listener
    if _listener is not None:
        _listener.give_back(-1)
        _listener = None


os.register_at_fork(after_in_child=_after_fork)

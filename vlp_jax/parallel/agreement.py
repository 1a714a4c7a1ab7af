"""What the processes of a job tell each other on the host, past the devices.

It goes through the key-value store of `jax.distributed`, not through collectives on the devices: a
collective would have to wait for the step that is under way, and on CPU the two get mixed up.

All processes must call these functions in the same order, as with any collective.
"""

from __future__ import annotations

import itertools
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# JAX has no public name for the client of its key-value store. This is the one place that uses it.
from jax._src import distributed

from vlp_jax.errors import UserError, error_of_status

T = TypeVar("T")

# How long a process waits for the slowest of the others. What others do meanwhile (reading a
# checkpoint, listing shards) takes minutes; a process that died is noticed by the heartbeat.
TIMEOUT_SECONDS = 1800.0

BARRIER_LOOK_MS = 500  # how often a barrier asks whether somebody failed

_rounds, _chapters = itertools.count(), itertools.count()
_rounds_to_first = itertools.count()


def gather(value: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any]:
    """The `value` of every process in the order of their numbers, on every process.

    Args:
      value: anything that JSON can hold; a few KB, since all of it goes through process 0.
      timeout: seconds to wait for the slowest process.

    Raises:
      RuntimeError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    client, number = distributed.global_state.client, next(_rounds)
    own = jax.process_index()
    client.key_value_set(_key(number, own), json.dumps(value))
    # Whoever gives a value in this round has read those of the round before.
    values = [
        json.loads(client.blocking_key_value_get(_key(number, process), int(timeout * 1000)))
        for process in range(jax.process_count())
    ]
    if number:
        client.key_value_delete(_key(number - 1, own))
    return values


def to_first(value: Any, timeout: float = TIMEOUT_SECONDS) -> list[Any] | None:
    """The `value` of every process in the order of their numbers, on process 0; None on the others.

    The others do not wait, and process 0 alone reads, so that it costs little with many processes.

    Raises:
      RuntimeError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    client, own = distributed.global_state.client, jax.process_index()
    folder = f"vlp_jax/to_first/{next(_rounds_to_first)}"
    if own:
        client.key_value_set(f"{folder}/{own}", json.dumps(value))
        return None
    others = [
        json.loads(client.blocking_key_value_get(f"{folder}/{process}", int(timeout * 1000)))
        for process in range(1, jax.process_count())
    ]
    client.key_value_delete(folder)
    return [value, *others]


def from_first(value: Any, timeout: float = TIMEOUT_SECONDS) -> Any:
    """The `value` of process 0, on every process. What the others give does not count."""
    return gather(value if jax.process_index() == 0 else None, timeout)[0]


def on_first(function: Callable[[], T], timeout: float = TIMEOUT_SECONDS) -> T:
    """What `function` gives on process 0, which alone calls it; JSON has to hold it.

    Raises:
      UserError: `function` raised one, which every process raises then, with the same status.
    """
    return _shared(function if jax.process_index() == 0 else lambda: None, timeout)[0]


def everywhere(function: Callable[[], T], timeout: float = TIMEOUT_SECONDS) -> list[T]:
    """What `function` gives on each process; JSON has to hold it.

    Raises:
      UserError: it raised one on some process; every process raises that of the first, with the
        same status.
    """
    return _shared(function, timeout)


class Barrier:
    """Waits for all processes at a named point, unless one of them has said that it failed.

    An ordinary barrier lets the others wait for a process that will not come until the time is up.
    It may be called from any thread. `renew` begins a new chapter, in which nobody has failed.
    """

    def __init__(self) -> None:
        self._chapter = next(_chapters)
        self._own: list[str] = []
        self._own_before: list[str] = []
        self._visits: Counter[str] = Counter()

    def renew(self) -> None:
        """Forgets failures and what was waited for. All processes call it, after they agreed."""
        # A slow process may yet have to read the keys of the chapter that ends, not older ones.
        for key in self._own_before:
            distributed.global_state.client.key_value_delete(key)
        self._own_before, self._own, self._chapter = self._own, [], next(_chapters)
        self._visits.clear()

    def fail(self, reason: str) -> None:
        """Tells whoever waits, or will wait, in this chapter that this process will not come."""
        if jax.process_count() > 1:
            key = f"vlp_jax/failed/{self._chapter}"
            distributed.global_state.client.key_value_set(key, reason, allow_overwrite=True)
            self._own.append(key)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Returns when all processes have called it with this `key`.

        Raises:
          RuntimeError: a process has failed.
          TimeoutError: one did not come in time.
        """
        if jax.process_count() == 1:
            return
        client, until = distributed.global_state.client, time.monotonic() + timeout_ms / 1000
        self._visits[key] += 1
        name = f"vlp_jax/barrier/{self._chapter}/{key}/{self._visits[key]}"
        own = f"{name}/{jax.process_index()}"
        client.key_value_set(own, "")
        self._own.append(own)
        for process in range(jax.process_count()):
            while not _there(client, f"{name}/{process}", BARRIER_LOOK_MS):
                if _is_set(client, f"vlp_jax/failed/{self._chapter}"):
                    raise RuntimeError(f"another process failed before {key}")
                if time.monotonic() > until:
                    raise TimeoutError(f"process {process} did not come to {key} in time")


class Notice:
    """A word that any process gives when it likes and all others hear, who then answer it.

    For threads that look from time to time. It is given once in the life of a job.
    """

    def __init__(self, name: str) -> None:
        self._folder = f"vlp_jax/notice/{name}"

    def give(self) -> None:
        """Tells all processes."""
        key = f"{self._folder}/given"
        distributed.global_state.client.key_value_set(key, "", allow_overwrite=True)

    def given(self) -> bool:
        """Whether a process has given it."""
        return _is_set(distributed.global_state.client, f"{self._folder}/given")

    def answers(self, question: str, own: Any, patient: Callable[[], bool]) -> list[Any] | None:
        """The answers of all processes to `question`, in order; None if it is not waited for them.

        Args:
          own: the answer of this process, which JSON has to hold.
          patient: whether to go on waiting; asked twice a second.
        """
        client, folder = distributed.global_state.client, f"{self._folder}/{question}"
        client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(own))
        for process in range(jax.process_count()):
            while not _there(client, f"{folder}/{process}", BARRIER_LOOK_MS):
                if not patient():
                    return None
        everyone = range(jax.process_count())
        return [json.loads(client.key_value_try_get(f"{folder}/{i}")) for i in everyone]


def _there(client: Any, key: str, wait_ms: int) -> bool:
    """Whether `key` is set, or is so within the time."""
    return _found(lambda: client.blocking_key_value_get(key, wait_ms))


def _is_set(client: Any, key: str) -> bool:
    """Whether `key` is set now; the answer may take its time over the network."""
    return _found(lambda: client.key_value_try_get(key))


def _found(look: Callable[[], Any]) -> bool:
    try:
        look()
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
            return False
        raise
    return True


def _shared(function: Callable[[], T], timeout: float) -> list[T]:
    try:
        own = {"value": function()}
    except UserError as error:
        if jax.process_count() == 1:
            raise
        own = {"error": str(error), "status": error.status}
    outcomes = gather(own, timeout)
    for process, outcome in enumerate(outcomes):
        if "error" in outcome:
            kind = error_of_status(outcome["status"])
            raise kind(f"process {process}: {outcome['error']}")
    return [outcome["value"] for outcome in outcomes]


def _key(number: int, process: int) -> str:
    return f"vlp_jax/agreement/{number}/{process}"

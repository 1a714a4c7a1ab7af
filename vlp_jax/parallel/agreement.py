"""Exchanges values between the processes of a job, on the host.

The values go through the key-value store of `jax.distributed`, and not through collectives on the
devices: a collective would wait for the step under way, and on CPU the two get mixed up.

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

# How long a process waits for the slowest one, which may take minutes (it reads a checkpoint or
# lists shards). JAX's heartbeat notices a process that died much sooner.
TIMEOUT_SECONDS = 1800.0
TIMEOUT_MS = round(1000 * TIMEOUT_SECONDS)

BARRIER_LOOK_MS = 500  # how often a barrier asks whether somebody failed

_rounds, _chapters = itertools.count(), itertools.count()
_rounds_to_first = itertools.count()


def gather(value: Any) -> list[Any]:
    """Returns the `value` of every process, ordered by process index, on every process.

    Args:
      value: anything that JSON can express, at most a few KB: all values go through process 0.

    Raises:
      RuntimeError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    client, number = distributed.global_state.client, next(_rounds)
    index = jax.process_index()
    client.key_value_set(_key(number, index), json.dumps(value))
    values = [
        json.loads(client.blocking_key_value_get(_key(number, process), TIMEOUT_MS))
        for process in range(jax.process_count())
    ]
    # Every process has set its value of this round, so every process has read the last round.
    if number:
        client.key_value_delete(_key(number - 1, index))
    return values


def to_first(value: Any) -> list[Any] | None:
    """Returns the `value` of every process on process 0, ordered by process index; None elsewhere.

    Only process 0 waits and reads, so it costs less than `gather` in a job of many processes.

    Raises:
      RuntimeError: a process did not come in time.
    """
    if jax.process_count() == 1:
        return [value]
    client, index = distributed.global_state.client, jax.process_index()
    folder = f"vlp_jax/to_first/{next(_rounds_to_first)}"
    if index:
        client.key_value_set(f"{folder}/{index}", json.dumps(value))
        return None
    others = [
        json.loads(client.blocking_key_value_get(f"{folder}/{process}", TIMEOUT_MS))
        for process in range(1, jax.process_count())
    ]
    client.key_value_delete(folder)
    return [value, *others]


def from_first(value: Any) -> Any:
    """Returns process 0's `value` on every process; the values of other processes are ignored."""
    return gather(value if jax.process_index() == 0 else None)[0]


def on_first(function: Callable[[], T]) -> T:
    """Calls `function` on process 0 alone, and returns its result on every process.

    JSON must be able to express the result.

    Raises:
      UserError: `function` raised a UserError. Every process raises it, with the same status.
    """
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"value": function()}
        except UserError as error:
            if jax.process_count() == 1:
                raise
            # It is sent as a value. If it were raised here, the others would wait in `gather`.
            outcome = {"error": str(error), "status": error.status}
    outcome = from_first(outcome)
    if "error" in outcome:
        raise error_of_status(outcome["status"])(f"process 0: {outcome['error']}")
    return outcome["value"]


class Barrier:
    """A barrier that a failed process can break, so that the others do not wait for it.

    With an ordinary barrier they would wait until the timeout. It may be called from any thread.
    `renew` begins a new chapter, without failures.
    """

    def __init__(self) -> None:
        self._chapter = next(_chapters)
        self._keys: list[str] = []  # that this process has set in this chapter
        self._keys_before: list[str] = []  # and in the chapter before
        self._visits: Counter[str] = Counter()

    def renew(self) -> None:
        """Forgets failures and arrivals. All processes must call it, after they have agreed."""
        # A slow process may still read the keys of the chapter that ends, but no older ones.
        for key in self._keys_before:
            distributed.global_state.client.key_value_delete(key)
        self._keys_before, self._keys, self._chapter = self._keys, [], next(_chapters)
        self._visits.clear()

    def fail(self, reason: str) -> None:
        """Breaks the barrier: processes that wait in this chapter, now or later, get an error."""
        if jax.process_count() > 1:
            key = f"vlp_jax/failed/{self._chapter}"
            distributed.global_state.client.key_value_set(key, reason, allow_overwrite=True)
            self._keys.append(key)

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes have called it with this `key`.

        Raises:
          RuntimeError: a process has failed.
          TimeoutError: a process did not arrive in time.
        """
        if jax.process_count() == 1:
            return
        client, until = distributed.global_state.client, time.monotonic() + timeout_ms / 1000
        self._visits[key] += 1
        name = f"vlp_jax/barrier/{self._chapter}/{key}/{self._visits[key]}"
        arrival = f"{name}/{jax.process_index()}"
        client.key_value_set(arrival, "")
        self._keys.append(arrival)
        for process in range(jax.process_count()):
            while not _appears(client, f"{name}/{process}", BARRIER_LOOK_MS):
                if _is_set(client, f"vlp_jax/failed/{self._chapter}"):
                    raise RuntimeError(f"another process failed before {key}")
                if time.monotonic() > until:
                    raise TimeoutError(f"process {process} did not come to {key} in time")


class Notice:
    """A message that any process may send at any time, and that all processes answer.

    For threads that poll. A notice can be given once in the life of a job.
    """

    def __init__(self, name: str) -> None:
        self._folder = f"vlp_jax/notice/{name}"

    def give(self) -> None:
        """Sends the notice to all processes."""
        key = f"{self._folder}/given"
        distributed.global_state.client.key_value_set(key, "", allow_overwrite=True)

    def given(self) -> bool:
        """Whether any process has given the notice."""
        return _is_set(distributed.global_state.client, f"{self._folder}/given")

    def answers(self, question: str, answer: Any, patient: Callable[[], bool]) -> list[Any] | None:
        """Exchanges answers to `question`; returns all of them in order, None if time ran out.

        Args:
          answer: the answer of this process; JSON must be able to express it.
          patient: whether to go on waiting; asked twice a second.
        """
        client, folder = distributed.global_state.client, f"{self._folder}/{question}"
        client.key_value_set(f"{folder}/{jax.process_index()}", json.dumps(answer))
        for process in range(jax.process_count()):
            while not _appears(client, f"{folder}/{process}", BARRIER_LOOK_MS):
                if not patient():
                    return None
        everyone = range(jax.process_count())
        return [json.loads(client.key_value_try_get(f"{folder}/{i}")) for i in everyone]


def _appears(client: Any, key: str, wait_ms: int) -> bool:
    """Whether `key` is set within the given time."""
    return _succeeds(lambda: client.blocking_key_value_get(key, wait_ms))


def _is_set(client: Any, key: str) -> bool:
    """Whether `key` is set now. It does not wait, except for the network."""
    return _succeeds(lambda: client.key_value_try_get(key))


def _succeeds(look_up: Callable[[], Any]) -> bool:
    """Whether a look-up finds its key. JAX reports a missing key by an exception alone."""
    try:
        look_up()
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" in str(error) or "NOT_FOUND" in str(error):
            return False
        raise
    return True


def _key(number: int, process: int) -> str:
    return f"vlp_jax/agreement/{number}/{process}"

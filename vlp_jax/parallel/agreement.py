"""What the processes of a job tell each other on the host, past the devices.

It goes through the key-value store of `jax.distributed`, not through collectives on the devices: a
collective would have to wait for the step that is under way, and on CPU the two get mixed up.

All processes must call these functions in the same order, as with any collective.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax

# JAX has no public name for the client of its key-value store. This is the one place that uses it.
from jax._src import distributed

from vlp_jax.errors import UserError

T = TypeVar("T")

# How long a process waits for the slowest of the others. What others do meanwhile (reading a
# checkpoint, listing shards) takes minutes; a process that died is noticed by the heartbeat.
TIMEOUT_SECONDS = 1800.0

_rounds = itertools.count()
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
      UserError: `function` raised one, which every process raises then.
    """
    return _shared(function if jax.process_index() == 0 else lambda: None, timeout)[0]


def everywhere(function: Callable[[], T], timeout: float = TIMEOUT_SECONDS) -> list[T]:
    """What `function` gives on each process; JSON has to hold it.

    Raises:
      UserError: it raised one on some process; every process raises that of the first.
    """
    return _shared(function, timeout)


def _shared(function: Callable[[], T], timeout: float) -> list[T]:
    try:
        own = {"value": function()}
    except UserError as error:
        if jax.process_count() == 1:
            raise
        own = {"error": str(error)}
    outcomes = gather(own, timeout)
    for process, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise UserError(f"process {process}: {outcome['error']}")
    return [outcome["value"] for outcome in outcomes]


def _key(number: int, process: int) -> str:
    return f"vlp_jax/agreement/{number}/{process}"

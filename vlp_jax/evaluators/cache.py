"""Embeddings that several evaluators ask for, kept for the length of one evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

MAX_BYTES = 2**31  # of all that is kept


class EmbeddingCache:
    """Arrays by key, for one set of parameters at a time; off unless it is `open`.

    Args:
      max_bytes: what would make it larger is not kept.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._params: Any = None
        self._found: dict[Hashable, np.ndarray] | None = None

    @contextlib.contextmanager
    def open(self, params: Any) -> Iterator[None]:
        """Keeps what is put with `params` (the same object) until it ends; may be nested."""
        before = self._params, self._found
        if self._found is None or self._params is not params:
            self._params, self._found = params, {}
        try:
            yield
        finally:
            self._params, self._found = before

    @property
    def bytes(self) -> int:
        """Size of what is kept."""
        return sum(array.nbytes for array in (self._found or {}).values())

    def get(self, params: Any, key: Hashable) -> np.ndarray | None:
        """What was put under `key` with `params`; None if there is nothing."""
        return None if self._found is None or params is not self._params else self._found.get(key)

    def put(self, params: Any, key: Hashable, array: np.ndarray) -> None:
        """Keeps `array` if the cache is open for `params` and has room; nobody may change it."""
        if self._found is None or params is not self._params:
            return
        if self.bytes + array.nbytes <= self._max_bytes:
            array.flags.writeable = False
            self._found[key] = array


def key_of(value: Any) -> Hashable:
    """A key for a config's value: equal for equal values; arrays count as the objects they are."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return ("mapping", *sorted((str(k), key_of(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return ("sequence", *(key_of(item) for item in value))
    if isinstance(value, np.ndarray):
        return ("array", id(value))
    return (type(value).__name__, str(value))

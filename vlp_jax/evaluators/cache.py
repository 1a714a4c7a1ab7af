"""Caches embeddings that several evaluators need, for the length of one evaluation."""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import numpy as np

MAX_BYTES = 2**31  # of all cached arrays


class EmbeddingCache:
    """Caches arrays by key, for one set of parameters at a time; off unless it is `open`.

    Args:
      max_bytes: an array that would make the cache larger is not cached.
    """

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._params: Any = None
        self._arrays: dict[Hashable, np.ndarray] | None = None  # None while it is off

    @contextlib.contextmanager
    def open(self, params: Any) -> Iterator[None]:
        """Turns the cache on for `params` (this very object) within the context; may be nested."""
        before = self._params, self._arrays
        # By identity: to compare parameters would cost more than the cache saves.
        if self._arrays is None or self._params is not params:
            self._params, self._arrays = params, {}
        try:
            yield
        finally:
            self._params, self._arrays = before

    @property
    def bytes(self) -> int:
        """The size of the cached arrays."""
        return sum(array.nbytes for array in (self._arrays or {}).values())

    def get(self, params: Any, key: Hashable) -> np.ndarray | None:
        """Returns the array under `key` for `params`; None if it is not cached."""
        return None if self._arrays is None or params is not self._params else self._arrays.get(key)

    def put(self, params: Any, key: Hashable, array: np.ndarray) -> None:
        """Caches `array` if the cache is open for `params` and has room; makes it read-only."""
        if self._arrays is None or params is not self._params:
            return
        if self.bytes + array.nbytes <= self._max_bytes:
            array.flags.writeable = False  # evaluators share it, so none of them may change it
            self._arrays[key] = array


def key_of(value: Any) -> Hashable:
    """Makes a key from a value of a config: equal for equal values, by identity for arrays."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return ("mapping", *sorted((str(k), key_of(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return ("sequence", *(key_of(item) for item in value))
    if isinstance(value, np.ndarray):
        return ("array", id(value))
    return (type(value).__name__, str(value))

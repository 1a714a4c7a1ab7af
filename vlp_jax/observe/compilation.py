"""Counts of compiled programs, their seconds, and hits of the persistent cache."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from typing import Any, Self

import jax

# Recorded by jax._src.compiler and jax._src.dispatch. JAX's own event "cache_misses" is recorded
# only where a program is written to the cache, which short ones and processes other than the first
# are not; so a miss is a request that is no hit.
_REQUEST = "/jax/compilation_cache/compile_requests_use_cache"
_HIT = "/jax/compilation_cache/cache_hits"
_SAVED = "/jax/compilation_cache/compile_time_saved_sec"
_BACKEND = "/jax/core/compile/backend_compile_duration"  # a compilation, or a read of the cache


@dataclasses.dataclass(frozen=True)
class Compiled:
    """The programs that were compiled in a stretch of time.

    Attributes:
      programs: their number.
      seconds: time in XLA, or in reading the cache.
      requests: programs that were looked for in the persistent cache; 0 if
        `jax_enable_compilation_cache` is off.
      hits: programs that were found there.
      saved_seconds: compilation time of the programs that were found, less the reading.
    """

    programs: int = 0
    seconds: float = 0.0
    requests: int = 0
    hits: int = 0
    saved_seconds: float = 0.0

    def __sub__(self, before: Compiled) -> Compiled:
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(before), strict=True)
        return Compiled(*(now - then for now, then in pairs))

    def from_cache(self) -> bool:
        """Whether every program came from the persistent cache."""
        return self.programs > 0 and self.hits == self.programs


class CompileWatch:
    """Counts compilations of all threads; calls `compiled` with seconds and name for its own."""

    def __init__(self, compiled: Callable[[float, str], None] = lambda seconds, name: None):
        self._compiled = compiled
        self._thread = 0
        self._so_far = Compiled()
        self._lock = threading.Lock()

    def so_far(self) -> Compiled:
        """Returns the counts up to now."""
        return self._so_far

    def __enter__(self) -> Self:
        self._thread = threading.get_ident()
        jax.monitoring.register_event_listener(self._event)
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        return self

    def __exit__(self, *exception: object) -> None:
        jax.monitoring.unregister_event_listener(self._event)
        jax.monitoring.unregister_event_duration_listener(self._duration)

    def _event(self, event: str, **more: Any) -> None:
        del more
        if event == _REQUEST:
            self._add(requests=1)
        elif event == _HIT:
            self._add(hits=1)

    def _duration(self, event: str, duration: float, **more: Any) -> None:
        if event == _SAVED:
            self._add(saved_seconds=duration)
        elif event == _BACKEND:
            self._add(programs=1, seconds=duration)
            # Only the thread that entered waits for its compilations; others cost no step.
            if threading.get_ident() == self._thread:
                self._compiled(duration, str(more.get("fun_name", "a program")))

    def _add(self, **increments: float) -> None:
        with self._lock:
            new = {name: getattr(self._so_far, name) + n for name, n in increments.items()}
            self._so_far = dataclasses.replace(self._so_far, **new)


def describe(step: Compiled, seconds: float) -> str:
    """Says how the step was made in `seconds`, for the log and the summary."""
    if step.from_cache():
        saved = f", which saved {step.saved_seconds:.1f} s" if step.saved_seconds >= 0.05 else ""
        return f"the step in {seconds:.1f} s, from the persistent cache{saved}"
    if step.requests:
        return f"the step in {seconds:.1f} s, it was not in the persistent cache"
    return f"the step in {seconds:.1f} s, the persistent cache is off"

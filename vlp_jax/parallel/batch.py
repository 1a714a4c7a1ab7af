"""Copies batches from the host to the mesh, before the step that needs them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from vlp_jax.parallel.mesh import batch_sharding


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Makes global arrays, split over the batch axes, from this process's part of a batch."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.ascontiguousarray(array))
        for name, array in batch.items()
    }


class Prefetcher:
    """Copies batches to the devices in a thread, up to `size` batches ahead.

    An exception of `batches` is raised by `next`. Use it as a context manager: the exit stops the
    thread.
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, size: int = 2):
        if size < 1:
            raise ValueError(f"a prefetcher keeps at least one batch, not {size}")
        self._queue: queue.Queue = queue.Queue(maxsize=size)
        self._stop = threading.Event()
        self._ended: BaseException | None = None
        self._thread = threading.Thread(
            target=self._fill, args=(batches, mesh), name="prefetch", daemon=True
        )

    def _fill(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh) -> None:
        try:
            for batch in batches:
                self._put(put_batch(batch, mesh))
                if self._stop.is_set():
                    return
            self._put(StopIteration())
        except BaseException as error:  # `next` raises it in the thread of the loop
            self._put(error)

    def _put(self, item: object) -> None:
        # With a timeout, or a full queue would keep the thread from noticing `_stop`.
        while not self._stop.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def __enter__(self) -> Prefetcher:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(timeout=10)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> dict[str, jax.Array]:
        item = self._queue.get() if self._ended is None else self._ended
        if isinstance(item, BaseException):
            self._stop.set()
            self._ended = item  # every further `next` raises it again, and never blocks
            raise item
        return item

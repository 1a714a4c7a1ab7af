"""From the streams of several sources to batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from vlp_jax.data.fault_log import Fault, FaultLog
from vlp_jax.data.schedule import Schedule
from vlp_jax.data.stream import Chunk, Positions, Report, Stream

Batch = dict[str, np.ndarray]

# Examples of a source that are prepared together, about at least, since a chunk has costs of its
# own; many more would come in gusts.
GROUP = 64


class BatchReader:
    """This process's part of consecutive batches.

    Small batches are prepared several at a time, large ones in several chunks; neither changes what
    is in a batch.

    Args:
      streams: of the sources, by name.
      schedule: which of their positions stand where.
      faults: told of examples that cannot be used.
      replace: whether the place of such an example is taken by another.
      first: number of the first batch.
      batches: how many; None for no end.
      end: positions from here on, which fill the last batch, repeat the one before it.
    """

    def __init__(
        self,
        streams: Mapping[str, Stream],
        schedule: Schedule,
        faults: FaultLog,
        *,
        replace: bool,
        first: int,
        batches: int | None,
        end: int | None = None,
    ) -> None:
        from vlp_jax.data.example_graph import CHUNK

        self._streams, self._faults, self._schedule = dict(streams), faults, schedule
        self._replace, self._first, self._batches, self._end = replace, first, batches, end
        self._local = schedule.layout.local_size
        self._in_group = max(1, GROUP * len(self._streams) // self._local)
        self._chunk = CHUNK
        self._per_group = -(-self._in_group * self._local // CHUNK)
        # Every source asks for every group, some ahead of others.
        self._plan = lru_cache(maxsize=256)(self._group)

    def _group(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each stream: places in a group of batches, and positions, int64 [n]."""
        begin = number * self._in_group
        end = begin + self._in_group
        if self._batches is not None:
            end = min(end, self._batches)
        plans = [
            self._schedule.of_batch(self._first + batch, len(self._streams))
            for batch in range(begin, end)
        ]
        found = []
        for entries in zip(*plans, strict=True):
            places = [place + i * self._local for i, (place, _) in enumerate(entries)]
            found.append((np.concatenate(places), np.concatenate([at for _, at in entries])))
        return found

    def _entries(self, chunk: int, stream: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the group, and positions, of a stream's chunk."""
        group, part = divmod(chunk, self._per_group)
        places, positions = self._plan(group)[stream]
        span = slice(part * self._chunk, (part + 1) * self._chunk)
        return places[span], positions[span]

    def _positions_of(self, stream: int) -> Positions:
        def positions(chunk: int) -> np.ndarray:
            found = self._entries(chunk, stream)[1]
            return found if self._end is None else np.minimum(found, self._end - 1)

        return positions

    def _report_of(self, stream: int, name: str) -> Report:
        def report(chunk: int, faults: Sequence[tuple[int, Fault]]) -> None:
            places, positions = self._entries(chunk, stream)
            real = np.ones(len(places), bool) if self._end is None else positions < self._end
            of_batch = places // self._local
            begin = self._first + chunk // self._per_group * self._in_group
            for batch in np.unique(of_batch).tolist():
                read = int((real & (of_batch == batch)).sum())
                here = [f for place, f in faults if of_batch[place] == batch and real[place]]
                self._faults.add(begin + batch, read, name, here)

        return report

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """(batch, which of its rows are sound) of each."""
        groups = None if self._batches is None else -(-self._batches // self._in_group)
        chunks = None if groups is None else groups * self._per_group
        readers = [
            stream.chunks(
                self._positions_of(number), chunks, self._replace, self._report_of(number, name)
            )
            for number, (name, stream) in enumerate(self._streams.items())
        ]
        group = 0
        while groups is None or group < groups:
            pieces = []
            for chunk in range(group * self._per_group, (group + 1) * self._per_group):
                for stream, reader in enumerate(readers):
                    pieces.append((self._entries(chunk, stream)[0], next(reader)))
            batch, sound = _assembled(pieces)
            for begin in range(0, len(sound), self._local):
                span = slice(begin, begin + self._local)
                yield {name: array[span] for name, array in batch.items()}, sound[span]
            group += 1


def _assembled(pieces: Sequence[tuple[np.ndarray, Chunk]]) -> tuple[Batch, np.ndarray]:
    """One batch from its chunks, each with the places of its examples."""
    pieces = [piece for piece in pieces if len(piece[0])]
    if len(pieces) == 1:
        return pieces[0][1].arrays, pieces[0][1].sound
    size = sum(len(places) for places, _ in pieces)
    sound = np.empty(size, bool)
    batch = {
        name: np.empty((size, *array.shape[1:]), array.dtype)
        for name, array in pieces[0][1].arrays.items()
    }
    for places, chunk in pieces:
        sound[places] = chunk.sound
        for name, array in chunk.arrays.items():
            batch[name][places] = array
    return batch, sound

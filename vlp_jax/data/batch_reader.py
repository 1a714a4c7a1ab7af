"""Assembles batches from the readers of one or several sources."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache

import numpy as np

from vlp_jax.data.fault_log import Fault, FaultLog
from vlp_jax.data.schedule import Schedule
from vlp_jax.data.source_reader import Chunk, OnFaults, Positions, SourceReader

Batch = dict[str, np.ndarray]

# Examples of a source that are prepared together, at least. A chunk of few examples costs more in
# overhead than in work; a chunk of very many would make batches come in bursts.
GROUP = 64


class BatchReader:
    """Yields this process's part of consecutive batches.

    Small batches are prepared several at a time (a group), large batches in several chunks. Neither
    changes what is in a batch. Chunk c of a source belongs to group c // chunks per group.

    Args:
      readers: source name -> reader.
      schedule: says which positions of which source stand where in a batch.
      faults: is told of examples that cannot be used.
      replace: whether another example takes the place of a bad one.
      first: number of the first batch.
      batches: how many; None for no end.
      end: first position behind the data, in evaluation. Places of the last batch at or behind it
        repeat the last example.
    """

    def __init__(
        self,
        readers: Mapping[str, SourceReader],
        schedule: Schedule,
        faults: FaultLog,
        *,
        replace: bool,
        first: int,
        batches: int | None,
        end: int | None = None,
    ) -> None:
        from vlp_jax.data.preprocess_graph import CHUNK

        self._readers, self._faults, self._schedule = dict(readers), faults, schedule
        self._replace, self._first, self._batches, self._end = replace, first, batches, end
        self._local = schedule.share.local_size
        self._in_group = max(1, GROUP * len(self._readers) // self._local)
        self._chunk = CHUNK
        self._per_group = -(-self._in_group * self._local // CHUNK)
        # Each source asks for each group, and some sources read far ahead of others.
        self._plan = lru_cache(maxsize=256)(self._plan_group)

    def _plan_group(self, number: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each source: places in a group of batches, and positions, int64 [n] both."""
        begin = number * self._in_group
        end = begin + self._in_group
        if self._batches is not None:
            end = min(end, self._batches)
        plans = [
            self._schedule.of_batch(self._first + batch, len(self._readers))
            for batch in range(begin, end)
        ]
        result = []
        for entries in zip(*plans, strict=True):
            places = [place + i * self._local for i, (place, _) in enumerate(entries)]
            result.append((np.concatenate(places), np.concatenate([at for _, at in entries])))
        return result

    def _entries(self, chunk: int, source: int) -> tuple[np.ndarray, np.ndarray]:
        """Places in the group, and positions, of a source's chunk."""
        group, part = divmod(chunk, self._per_group)
        places, positions = self._plan(group)[source]
        span = slice(part * self._chunk, (part + 1) * self._chunk)
        return places[span], positions[span]

    def _positions_of(self, source: int) -> Positions:
        def positions(chunk: int) -> np.ndarray:
            planned = self._entries(chunk, source)[1]
            return planned if self._end is None else np.minimum(planned, self._end - 1)

        return positions

    def _on_faults_of(self, source: int, name: str) -> OnFaults:
        def on_faults(chunk: int, faults: Sequence[tuple[int, Fault]]) -> None:
            places, positions = self._entries(chunk, source)
            # Padding of the last batch repeats an example, which must not count twice.
            real = np.ones(len(places), bool) if self._end is None else positions < self._end
            of_batch = places // self._local
            begin = self._first + chunk // self._per_group * self._in_group
            for batch in np.unique(of_batch).tolist():
                read = int((real & (of_batch == batch)).sum())
                here = [f for place, f in faults if of_batch[place] == batch and real[place]]
                self._faults.add(begin + batch, read, name, here)

        return on_faults

    def __iter__(self) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields (batch, which of its rows are sound, bool [local_size])."""
        groups = None if self._batches is None else -(-self._batches // self._in_group)
        chunks = None if groups is None else groups * self._per_group
        # All sources are asked for the same number of chunks, empty ones included, so that the
        # loop below can take one of each in turn.
        streams = [
            reader.chunks(
                self._positions_of(number), chunks, self._replace, self._on_faults_of(number, name)
            )
            for number, (name, reader) in enumerate(self._readers.items())
        ]
        group = 0
        while groups is None or group < groups:
            pieces = []
            for chunk in range(group * self._per_group, (group + 1) * self._per_group):
                for source, stream in enumerate(streams):
                    pieces.append((self._entries(chunk, source)[0], next(stream)))
            batch, sound = _assembled(pieces)
            for begin in range(0, len(sound), self._local):
                span = slice(begin, begin + self._local)
                yield {name: array[span] for name, array in batch.items()}, sound[span]
            group += 1


def _assembled(pieces: Sequence[tuple[np.ndarray, Chunk]]) -> tuple[Batch, np.ndarray]:
    """Puts chunks together, each with the places of its examples."""
    pieces = [piece for piece in pieces if len(piece[0])]
    if len(pieces) == 1:
        # The places of a single chunk are in order: nothing has to be copied.
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

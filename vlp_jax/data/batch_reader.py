"""Says which example of which source stands where in a batch, and assembles batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np

from vlp_jax.data.faults import Fault, FaultLog
from vlp_jax.data.source_reader import Chunk, OnFaults, Positions, SourceReader
from vlp_jax.errors import UserError

# Products of a row's remainder and a numerator stay below 2^62, within int64.
_MAX_DENOMINATOR = 2**31 - 1


@dataclass(frozen=True)
class BatchShare:
    """The part of each global batch that a process reads: block p belongs to process p.

    Raises UserError if the processes do not divide the batch.
    """

    batch_size: int
    process_index: int = 0
    process_count: int = 1

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.batch_size % self.process_count:
            raise UserError(
                f"batch_size={self.batch_size} cannot be divided among {self.process_count} "
                f"processes: choose a multiple of {self.process_count}"
            )
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(f"process {self.process_index} of {self.process_count}")

    @property
    def local_size(self) -> int:
        return self.batch_size // self.process_count

    @property
    def places(self) -> np.ndarray:
        """This process's places in a global batch, int64 [local_size]."""
        return np.arange(self.local_size) + self.process_index * self.local_size


@dataclass(frozen=True)
class Mixture:
    """Divides a stream among sources in fixed proportions, evenly and for ever.

    The stream consists of lanes, each an endless sequence of rows. Of the first r rows of a lane,
    source s takes weight_s * r, to less than one for each other source. In a sequence that two
    sources share, row r is the first one's if floor((r + 1) p / q + c) > floor(r p / q + c), where
    p / q is its share: the rows of a line drawn on a grid (Bresenham 1965). With more sources, the
    first one shares with all the others together, and so on. The lanes begin at different points
    c, so that a batch over all lanes holds of every source what its weight says, to a few.

    Attributes:
      shares: of source s among the sources from s on, each (p, q) with 0 < p <= q < 2^31; the last
        one is (1, 1).
      lanes: how many.
    """

    shares: tuple[tuple[int, int], ...]
    lanes: int

    @classmethod
    def of_weights(cls, weights: Sequence[float], lanes: int) -> Mixture:
        """Weights above 0, in any unit. Shares are exact for weights with few digits."""
        # By way of the decimal digits: 0.1 as a float is not one tenth.
        exact = [Fraction(str(weight)) for weight in weights]
        shares = []
        for number, weight in enumerate(exact):
            share = (weight / sum(exact[number:])).limit_denominator(_MAX_DENOMINATOR)
            # A share below the precision is rounded to the least share, never to none or all.
            share = max(share, Fraction(1, _MAX_DENOMINATOR))
            if number + 1 < len(exact):
                share = min(share, Fraction(_MAX_DENOMINATOR - 1, _MAX_DENOMINATOR))
            shares.append((share.numerator, share.denominator))
        return cls(tuple(shares), lanes)

    def assign(self, rows: np.ndarray, lanes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row, and the row of that source's own sequence; all int64 [n]."""
        source = np.zeros(len(rows), np.int64)
        own, left = rows.astype(np.int64), np.arange(len(rows))
        for number, (p, q) in enumerate(self.shares):
            # Lanes begin at evenly spread points of the period q.
            begin = lanes[left] * q // self.lanes
            before = _line(own[left], p, q, begin)
            taken = _line(own[left] + 1, p, q, begin) > before
            source[left[taken]] = number
            # The source has taken `before` of the earlier rows; the sources behind it the rest.
            own[left] = np.where(taken, before, own[left] - before)
            left = left[~taken]
        return source, own


def _line(rows: np.ndarray, p: int, q: int, begin: np.ndarray) -> np.ndarray:
    """floor((rows * p + begin) / q) without overflow."""
    # rows * p may exceed int64 in a long run; rest * p cannot.
    whole, rest = np.divmod(rows, q)
    return whole * p + (rest * p + begin) // q


@dataclass(frozen=True)
class Schedule:
    """Says which positions a process reads for each batch.

    Place g of a global batch of B examples belongs to lane g // (B / lanes). Lane l consists of the
    positions n with n % lanes = l, so that a process reads few lanes of every source.
    """

    share: BatchShare
    mixture: Mixture

    def __post_init__(self) -> None:
        if self.share.batch_size % self.mixture.lanes:
            raise ValueError(f"{self.mixture.lanes} lanes do not divide {self.share.batch_size}")

    def of_batch(self, batch: int, count: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each of `count` sources: places in this process's part, and positions, int64 [k].

        With one source of one lane, place g of batch b is position b * batch_size + g.
        """
        lanes = self.mixture.lanes
        depth = self.share.batch_size // lanes
        lane, inside = np.divmod(self.share.places, depth)
        source, row = self.mixture.assign(batch * depth + inside, lane)
        found = []
        for number in range(count):
            places = np.flatnonzero(source == number)
            found.append((places, row[places] * lanes + lane[places]))
        return found


def check_weights(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The weights above 0 of the parts of a mixture; raises UserError for what is no weight."""
    weights = {}
    for name, part in parts.items():
        weight = part.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"data.parts.{name}.weight={weight!r} must be a number, 0 or more")
        if not 0 <= weight < float("inf"):
            raise UserError(f"data.parts.{name}.weight={weight} must be 0 or more, and finite")
        if weight:
            weights[name] = weight
    if not weights:
        listed = ", ".join(parts) or "there are none"
        raise UserError(f"data.parts: no part has a weight above 0 ({listed})")
    return weights


Batch = dict[str, np.ndarray]

# Examples of a source that are prepared together, at least. A chunk of few examples costs more in
# overhead than in work; a chunk of very many would make batches come in bursts.
GROUP = 64


class BatchReader:
    """Yields this process's part of consecutive batches.

    Small batches are prepared several at a time (a group), large batches in several chunks. Neither
    changes what is in a batch. Chunk c of a source belongs to group c // chunks per group.

    Args:
      replace: whether another example takes the place of a bad one.
      first, batches: number of the first batch, and how many; None for no end.
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

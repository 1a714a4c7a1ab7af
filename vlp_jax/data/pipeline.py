"""Batches of a data config: endless and shuffled for training, once through for evaluation.

Which example stands at which place of which batch, the random numbers of its operations and so the
batches are pure functions of (seed, number of the batch). The whole state of the input is therefore
that number, and the global batches are the same for every number of processes.

An example that cannot be used is counted and, in training, its place is taken by the example that
stands there a batch later; in evaluation its mask is False. So nothing shifts.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from vlp_jax.data.batch_ops import build_batch_ops
from vlp_jax.data.batch_reader import (
    Batch,
    BatchReader,
    BatchShare,
    Mixture,
    Schedule,
    check_weights,
)
from vlp_jax.data.faults import MAX_BAD_FRACTION, FaultLog
from vlp_jax.data.order import BATCH_OPERATIONS, example_seeds
from vlp_jax.data.source_reader import SourceReader
from vlp_jax.data.sources.base import FieldSpec, as_plain
from vlp_jax.data.sources.labels import listed, same_numbers
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.errors import UserError, unknown_key_message

__all__ = ["Batch", "BatchSpec", "EvalPipeline", "BatchShare", "TrainPipeline"]

BatchSpec = dict[str, tuple[tuple[int, ...], np.dtype]]

MIXTURE = "mixture"
_MIXTURE_KEYS = ("source", "parts", "max_bad_fraction", "batch_ops")
_ONE = "data"  # the name of the source of a config that is no mixture


class _Pipeline:
    """Readers of sources, and batches from them, for training and evaluation."""

    def __init__(
        self,
        readers: Mapping[str, SourceReader],
        schedule: Schedule,
        faults: FaultLog,
        replace: bool,
    ) -> None:
        self._readers = dict(readers)
        self._schedule = schedule
        self._replace = replace
        self.faults = faults
        _ = self._arrays

    def __len__(self) -> int:
        return sum(len(reader.source) for reader in self._readers.values())

    @property
    def lanes(self) -> int:
        """How many lanes a batch consists of; see `Schedule`."""
        return self._schedule.mixture.lanes

    @property
    def source_names(self) -> tuple[str, ...]:
        """The names under which bad examples are counted: "data", or the parts of a mixture."""
        return tuple(self._readers)

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """The names of the classes that the integer `field` counts, or None if not known."""
        known = [reader.source.class_names(field) for reader in self._readers.values()]
        return known[0] if all(names == known[0] for names in known) else None

    def check_classes(self, field: str, classes: int) -> None:
        """Raises UserError unless `field` counts at most `classes` classes, alike in all parts."""
        first, *others = self._readers.items()
        known = first[1].source.class_names(field)
        for name, reader in others:
            names = reader.source.class_names(field)
            if not same_numbers(known, names):
                raise UserError(
                    f"the parts of a mixture number the classes of {field!r} differently: "
                    f"{first[0]} has {listed(known or ['numbers'])}, {name} has "
                    f"{listed(names or ['numbers'])}; set label_names of each to one list of all"
                )
        if known is not None and len(known) > classes:
            raise UserError(
                f"the data has {len(known)} classes in {field!r} ({listed(known)}), and the "
                f"objective tells {classes}: set config.objective.classes"
            )

    def fingerprint(self) -> str:
        """A hash that changes if examples get other numbers, so that the order cannot go on."""
        parts = [
            f"{name}:{reader.source.fingerprint()}:{reader.order.fingerprint()}"
            for name, reader in self._readers.items()
        ]
        whole = "\n".join([*parts, str(self._schedule.mixture)])
        return hashlib.sha256(whole.encode()).hexdigest()[:32]

    @cached_property
    def _arrays(self) -> dict[str, FieldSpec]:
        """The fields of a batch that are numbers, without the leading dimension."""
        first, *others = self._readers.items()
        for name, reader in others:
            if reader.arrays != first[1].arrays:
                raise UserError(
                    f"the parts of a mixture must give the same fields: {first[0]} gives "
                    f"{_listed(first[1].arrays)}, {name} gives {_listed(reader.arrays)}; change "
                    "their preprocess"
                )
        return first[1].arrays

    def _example_spec(self) -> BatchSpec:
        return {name: (spec.shape, spec.dtype) for name, spec in self._arrays.items()}

    def _batch_spec(self, example: BatchSpec) -> BatchSpec:
        size = self._schedule.share.batch_size
        return {name: ((size, *shape), dtype) for name, (shape, dtype) in example.items()}

    def _read(
        self, first: int, batches: int | None, end: int | None = None
    ) -> Iterator[tuple[Batch, np.ndarray]]:
        """Yields this process's part of batches from `first` on, and which rows are sound."""
        what = {"replace": self._replace, "first": first, "batches": batches, "end": end}
        return iter(BatchReader(self._readers, self._schedule, self.faults, **what))


class TrainPipeline(_Pipeline):
    """Shuffled batches without end.

    A batch holds `image` (uint8 [b, size, size, 3]), `text` (int32 [b, context_length], if the
    operations leave a string `text` and there is a tokenizer) and every other field that is a
    number or an array of fixed shape; strings and lists of varying length are dropped. Epochs
    follow one another within batches: no example is dropped and no batch is short. `faults` counts
    bad examples.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        extra_fields: Sequence[str] = (),
    ) -> None:
        """Builds the sources and checks everything that can be checked without reading examples.

        Args:
          config: see `vlp_jax.data.sources.build_source`, `source_reader.make_order`, `FaultLog`,
            `ops.build_ops` and `batch_ops.build_batch_ops`. Or a mixture: `source` is "mixture",
            and `parts` maps names to data configs that have a `weight` each.
          tokenizer: for `text`; None if the text is tokens already or not wanted.
          batch_size: examples in a global batch, over all processes.
          seed: of the order and of all random operations.
          extra_fields: as `EvalPipeline`.

        Raises:
          UserError: for a mistake in the config, or if the processes do not divide the batch.
        """
        config = as_plain(config)
        share = BatchShare(batch_size, process_index, process_count)
        parts, weights = split_mixture(config)
        readers = {}
        for name, part in parts.items():
            mixed = config.get("source") == MIXTURE
            own = own_seed(seed, name) if mixed else seed
            with within(f"data.parts.{name}: ") if mixed else contextlib.nullcontext():
                how = {"seed": own, "shuffle": True, "batch_size": batch_size}
                readers[name] = SourceReader(part, tokenizer, **how, extra_fields=extra_fields)
        # A lane of the batch takes from the lane of the same number of each source.
        lanes = math.lcm(*(reader.order.lanes for reader in readers.values()))
        mixture = Mixture.of_weights(weights, lanes)
        faults = FaultLog(config.get("max_bad_fraction", MAX_BAD_FRACTION))
        super().__init__(readers, Schedule(share, mixture), faults, replace=True)
        self._seed = seed
        self._batch_ops = build_batch_ops(config.get("batch_ops"), share.local_size)
        self._spec = self._example_spec()
        for op in self._batch_ops:
            self._spec = op.output_spec(self._spec)

    def batch_spec(self) -> BatchSpec:
        """Shape and dtype of every array of a global batch; reads no examples."""
        return self._batch_spec(self._spec)

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """Yields this process's part of the global batches from number `start_step` on.

        Seeking costs nothing: the batches are bit for bit those that an iterator from 0 comes to.
        """
        share, count = self._schedule.share, len(self._batch_ops)
        for number, (batch, _) in enumerate(self._read(start_step, None), start_step):
            places = share.places + number * share.batch_size
            seeds = example_seeds(self._seed, places, count, BATCH_OPERATIONS) if count else ()
            for which, op in enumerate(self._batch_ops):
                batch = op(batch, seeds[:, which])
            yield batch

    def examples_of(self, batch: int) -> list[str]:
        """Where the example of each place of a global batch lies; reads no examples.

        If that example cannot be used, the batch holds another, which is not named here.
        """
        whole = Schedule(BatchShare(self._schedule.share.batch_size), self._schedule.mixture)
        found = [""] * whole.share.batch_size
        parts = whole.of_batch(batch, len(self._readers))
        for reader, (places, positions) in zip(self._readers.values(), parts, strict=True):
            indices = reader.order.indices(positions)
            for place, index in zip(places.tolist(), indices.tolist(), strict=True):
                found[place] = reader.source.describe(index)
        return found


class EvalPipeline(_Pipeline):
    """Reads each example once, in the order of the source, over all processes together.

    Batches are like `TrainPipeline`'s, with `mask` (bool [b]): False marks the examples that fill
    up the last batch, and those that cannot be used. All processes yield the same number of
    batches. `len()` does not count padding; `faults` counts the bad examples of the newest
    `batches()`.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        *,
        batch_size: int,
        process_index: int = 0,
        process_count: int = 1,
        extra_fields: Sequence[str] = (),
        gather: Callable[[Sequence[int]], Sequence[Sequence[int]]] = lambda own: [own],
    ) -> None:
        """Builds the source as `TrainPipeline` does, without its `batch_ops`.

        Args:
          gather: the numbers that every process gives, on every process; see `FaultLog.check_all`.
          extra_fields: further fields that batches shall hold as object arrays [b]: strings as
            bytes, lists of varying length as arrays. "text_raw" is `text` before it is tokenized.
        """
        config = as_plain(config)
        if config.get("source") == MIXTURE:
            raise UserError(
                "a mixture cannot be evaluated: give the evaluator the data of one of its parts"
            )
        share = BatchShare(batch_size, process_index, process_count)
        how = {"seed": 0, "shuffle": False, "batch_size": batch_size}
        reader = SourceReader(config, tokenizer, **how, extra_fields=extra_fields)
        self._max_bad_fraction = config.get("max_bad_fraction", MAX_BAD_FRACTION)
        self._gather = gather
        schedule = Schedule(share, Mixture(((1, 1),), 1))
        faults = FaultLog(self._max_bad_fraction, of_split=True)
        super().__init__({_ONE: reader}, schedule, faults, replace=False)

    @property
    def num_batches(self) -> int:
        return -(-len(self) // self._schedule.share.batch_size)

    def batch_spec(self) -> BatchSpec:
        """Shape and dtype of every numeric array of a global batch; reads no examples."""
        mask = ((self._schedule.share.batch_size,), np.dtype(bool))
        return {**self._batch_spec(self._example_spec()), "mask": mask}

    def batches(self) -> Iterator[Batch]:
        """Yields this process's part of all batches; may be called again.

        Raises NoScores at the end if too many examples are bad.
        """
        share = self._schedule.share
        self.faults = FaultLog(self._max_bad_fraction, of_split=True)
        read = self._read(0, self.num_batches, end=len(self))
        for number, (batch, sound) in enumerate(read):
            # Places behind the end of the data repeat its last example.
            inside = share.places + number * share.batch_size < len(self)
            yield {**batch, "mask": sound & inside}
        self.faults.check_all(self._gather)


def split_mixture(config: Mapping[str, Any]) -> tuple[dict[str, dict[str, Any]], list[float]]:
    """Splits a config into the data configs of its parts, by name, and their weights."""
    if config.get("source") != MIXTURE:
        return {_ONE: dict(config)}, [1.0]
    # Every config has these keys (`config.DATA_DEFAULTS`), so they are no mistake here.
    for key in config:
        if key not in (*_MIXTURE_KEYS, "order", "lanes", "window"):
            raise UserError(unknown_key_message(key, _MIXTURE_KEYS, "data (a mixture)"))
    parts = config.get("parts") or {}
    if not isinstance(parts, Mapping) or not all(isinstance(p, Mapping) for p in parts.values()):
        raise UserError("data.parts must map the name of each part to its data config")
    for name, part in parts.items():
        for key in ("max_bad_fraction", "batch_ops"):
            if key in part:
                raise UserError(f"data.parts.{name}.{key}: set data.{key}, of the whole mixture")
    common = ("order", "lanes", "window", "max_bad_fraction")
    shared = {key: config[key] for key in common if key in config}
    weights = check_weights(parts)
    chosen = {
        name: {**shared, **{k: v for k, v in parts[name].items() if k != "weight"}}
        for name in weights
    }
    return chosen, list(weights.values())


@contextlib.contextmanager
def within(prefix: str) -> Iterator[None]:
    """Names the part of a mixture, or the dataset, in the message of a mistake."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def own_seed(seed: int, name: str) -> int:
    """The seed of one of several datasets; with one seed, equal sizes would stay in step."""
    return (seed + zlib.crc32(name.encode())) % 2**31


def _listed(arrays: Mapping[str, FieldSpec]) -> str:
    return ", ".join(f"{name} {spec.dtype}{list(spec.shape)}" for name, spec in arrays.items())


class MultiPipeline:
    """A `TrainPipeline`, and further ones whose fields are named "NAME/field".

    Each dataset has an order of its own, so that no two of them stay in step. The state of the
    input is still the number of the next batch.

    Args:
      extra: name -> data config. The seeds of these datasets depend on their names too.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        extra: Mapping[str, Mapping[str, Any]],
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        **share: int,
    ) -> None:
        self._first = TrainPipeline(config, tokenizer, seed=seed, **share)
        self._extra = {}
        for name, data in extra.items():
            with within(f"config.extra_data.{name}: "):
                own = own_seed(seed, name)
                self._extra[name] = TrainPipeline(data, tokenizer, seed=own, **share)

    def __len__(self) -> int:
        """The number of examples of the first dataset, whose epochs are counted."""
        return len(self._first)

    def pipelines(self) -> dict[str, TrainPipeline]:
        """The first one under "", and the further ones under their names."""
        return {"": self._first, **self._extra}

    def fingerprint(self) -> str:
        return ";".join(pipeline.fingerprint() for pipeline in self.pipelines().values())

    def batch_spec(self) -> BatchSpec:
        spec = self._first.batch_spec()
        for name, pipeline in self._extra.items():
            spec |= {f"{name}/{key}": value for key, value in pipeline.batch_spec().items()}
        return spec

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        # Batches of step n of all datasets go together, so one number is the state of them all.
        streams = [pipeline.batches(start_step) for pipeline in self._extra.values()]
        for first, *others in zip(self._first.batches(start_step), *streams, strict=True):
            joined = dict(first)
            for name, batch in zip(self._extra, others, strict=True):
                joined |= {f"{name}/{key}": value for key, value in batch.items()}
            yield joined

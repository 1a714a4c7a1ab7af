"""From a data config to batches: endless and shuffled for training, once through for evaluation.

Example n of a process's stream lies at a position of the global stream that is a pure function of
n, and the order, the random numbers of the operations and so the batches are pure functions of
(seed, position). The whole state of the input is therefore the number of the next batch, and the
global batches are the same for every number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from vlp_jax.data.order import Order, example_seeds
from vlp_jax.data.sources import Source, build_source
from vlp_jax.data.sources.base import STRING, FieldSpec, as_plain
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.errors import UserError, unknown_key_message

Batch = dict[str, np.ndarray]
BatchSpec = dict[str, tuple[tuple[int, ...], np.dtype]]

RAW_TEXT = "text_raw"  # the name of the extra field that holds `text` before it is tokenized


@dataclass(frozen=True)
class Layout:
    """Which part of the global stream a process reads: block p of every batch is process p's.

    Attributes:
      batch_size: examples in a global batch.
      process_index, process_count: this process, and how many there are.

    Raises:
      UserError: if the processes do not divide the batch.
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

    def positions(self, local: np.ndarray) -> np.ndarray:
        """Global positions of the examples `local` (int64 [n]) of this process's stream."""
        batch, place = np.divmod(local, self.local_size)
        return batch * self.batch_size + self.process_index * self.local_size + place

    def positions_of_batch(self, batch: int) -> np.ndarray:
        """Global positions of this process's part of a batch, int64 [local_size]."""
        return self.positions(np.arange(self.local_size) + batch * self.local_size)


class _Pipeline:
    """What training and evaluation share: the source, its fields, and the two ways to read it."""

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        layout: Layout,
        seed: int,
        shuffle: bool,
        extra_fields: Sequence[str] = (),
    ) -> None:
        config = as_plain(config)
        self.source: Source = build_source(config)
        self.layout = layout
        self._preprocess = config.get("preprocess") or {}
        self._tokenizer = tokenizer
        self._seed = seed
        self._order = Order(len(self.source), seed, shuffle)
        self._raw_text = RAW_TEXT in extra_fields
        self._extra_fields = [name for name in extra_fields if name != RAW_TEXT]
        outputs = self._outputs
        if self._raw_text and outputs.get("text") != STRING:
            raise UserError(f"extra field {RAW_TEXT}: data.preprocess leaves no string 'text'")

    def __len__(self) -> int:
        """The number of examples of the source."""
        return len(self.source)

    def class_names(self, field: str) -> tuple[str, ...] | None:
        """The names of the classes that the integer `field` counts, or None if not known."""
        return self.source.class_names(field)

    @cached_property
    def _ops(self) -> list[Any]:
        if not self._preprocess:
            return []
        from vlp_jax.data.ops import build_ops

        return build_ops(self._preprocess)

    @cached_property
    def _graph(self) -> Any:
        """The TensorFlow graph of an example; None if reading needs no TensorFlow."""
        if not self._ops and not self.source.needs_tensorflow:
            return None
        from vlp_jax.data.example_graph import ExampleGraph

        return ExampleGraph(self.source, self._ops, self._extra_fields)

    @cached_property
    def _outputs(self) -> Mapping[str, FieldSpec]:
        """The fields of an example before its text is tokenized."""
        if self._graph is not None:
            return self._graph.outputs
        specs = self.source.fields()
        for name in self._extra_fields:
            if name not in specs:
                raise UserError(f"extra fields: {unknown_key_message(name, specs, 'the example')}")
        kept = {"text", *self._extra_fields}
        return {name: spec for name, spec in specs.items() if spec.is_array or name in kept}

    @cached_property
    def _arrays(self) -> dict[str, FieldSpec]:
        """The fields of a batch that are numbers, without the leading dimension."""
        arrays = {name: spec for name, spec in self._outputs.items() if spec.is_array}
        if self._outputs.get("text") == STRING and self._tokenizer is not None:
            arrays["text"] = FieldSpec((self._tokenizer.context_length,), np.dtype(np.int32))
        return arrays

    def _batch_spec(self) -> BatchSpec:
        size = self.layout.batch_size
        return {name: ((size, *spec.shape), spec.dtype) for name, spec in self._arrays.items()}

    def _plan(self, local: np.ndarray, end: int | None) -> tuple[np.ndarray, np.ndarray]:
        """Which examples this process reads as its `local` ones, and the seeds of their operations.

        Positions from `end` on, which fill the last batch, repeat the one before it.
        """
        positions = self.layout.positions(local)
        if end is not None:
            positions = np.minimum(positions, end - 1)
        return self._order.indices(positions), example_seeds(self._seed, positions, len(self._ops))

    def _read(self, first: int, batches: int | None, end: int | None = None) -> Iterator[Batch]:
        """This process's part of `batches` (None: endless) batches from number `first` on."""
        if self._graph is None:
            return self._read_arrays(first, batches, end)
        return self._read_graph(first, batches, end)

    def _read_arrays(self, first: int, batches: int | None, end: int | None) -> Iterator[Batch]:
        size = self.layout.local_size
        for number in count(first) if batches is None else range(first, first + batches):
            indices, _ = self._plan(np.arange(size) + number * size, end)
            record = self.source.fetch(indices)
            batch = {name: record[name] for name in self._outputs}
            if self._outputs.get("text") == STRING:
                text = batch.pop("text")
                if self._raw_text:
                    batch[RAW_TEXT] = text
                if self._tokenizer is not None:
                    batch["text"] = self._tokenizer(list(text))
            yield batch

    def _read_graph(self, first: int, batches: int | None, end: int | None) -> Iterator[Batch]:
        from vlp_jax.data import example_graph

        size = self.layout.local_size
        total = None if batches is None else batches * size
        chunk = min(example_graph.CHUNK, size)

        def plan(number: int) -> tuple[np.ndarray, np.ndarray]:
            stop = (number + 1) * chunk if total is None else min((number + 1) * chunk, total)
            return self._plan(np.arange(number * chunk, stop) + first * size, end)

        chunks = None if total is None else -(-total // chunk)
        dataset = self._graph.dataset(plan, chunks).batch(size, drop_remainder=True)
        if self._outputs.get("text") == STRING:
            dataset = example_graph.tokenize(
                dataset, self._tokenizer, RAW_TEXT if self._raw_text else None
            )
        number = first
        try:
            for batch in example_graph.run(dataset):
                yield self._graph.unpack(batch)
                number += 1
        except example_graph.import_tensorflow().errors.OpError:
            culprit = self._graph.find_culprit(*self._plan(np.arange(size) + number * size, end))
            if culprit is None:
                raise
            raise UserError(f"batch {number} cannot be read: {culprit}") from None


class TrainPipeline(_Pipeline):
    """Shuffled batches without end.

    A batch holds `image` (uint8 [b, size, size, 3]), `text` (int32 [b, context_length], if the
    operations leave a string `text` and there is a tokenizer) and every other field that is a
    number or an array of fixed shape; strings and lists of varying length are dropped. Epochs
    follow one another within batches: no example is dropped and no batch is short.
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
    ) -> None:
        """Builds the source and checks everything that can be checked without reading examples.

        Args:
          config: see `vlp_jax.data.sources.build_source`; `preprocess` as `ops.build_ops` takes it.
          tokenizer: for `text`; None if the text is tokens already or not wanted.
          batch_size: examples in a global batch, over all processes.
          seed: of the order and of all random operations.
          process_index, process_count: this process, and how many there are.

        Raises:
          UserError: for a mistake in the config, or if the processes do not divide the batch.
        """
        layout = Layout(batch_size, process_index, process_count)
        super().__init__(config, tokenizer, layout, seed, shuffle=True)

    def batch_spec(self) -> BatchSpec:
        """Shape and dtype of every array of a global batch; reads no examples."""
        return self._batch_spec()

    def batches(self, start_step: int = 0) -> Iterator[Batch]:
        """This process's part of the global batches from number `start_step` on.

        Seeking costs nothing: the batches are bit for bit those that an iterator from 0 comes to.

        Raises:
          UserError: while iterating, for an example that cannot be read or decoded; names it.
        """
        return self._read(start_step, None)


class EvalPipeline(_Pipeline):
    """Every example once, in the order of the source, over all processes together.

    Batches are those of `TrainPipeline`, with `mask` (bool [b]): False marks the examples that
    fill up the last batch. All processes yield the same number of batches. `len()` is the number
    of examples, padding not counted.
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
    ) -> None:
        """As `TrainPipeline`.

        Args:
          extra_fields: further fields that batches shall hold as object arrays [b]: strings as
            bytes, lists of varying length as arrays. "text_raw" is `text` before it is tokenized.
        """
        layout = Layout(batch_size, process_index, process_count)
        super().__init__(config, tokenizer, layout, 0, shuffle=False, extra_fields=extra_fields)

    @property
    def num_batches(self) -> int:
        """How many batches `batches()` yields, on every process."""
        return -(-len(self) // self.layout.batch_size)

    def batch_spec(self) -> BatchSpec:
        """Shape and dtype of every numeric array of a global batch; reads no examples."""
        mask = ((self.layout.batch_size,), np.dtype(bool))
        return {**self._batch_spec(), "mask": mask}

    def batches(self) -> Iterator[Batch]:
        """This process's part of all batches; may be called again.

        Raises:
          UserError: while iterating, for an example that cannot be read or decoded; names it.
        """
        size = self.layout.local_size
        for number, batch in enumerate(self._read(0, self.num_batches, end=len(self))):
            positions = self.layout.positions(np.arange(size) + number * size)
            yield {**batch, "mask": positions < len(self)}


def sample_texts(config: Mapping[str, Any], limit: int = 20_000, seed: int = 0) -> Iterator[str]:
    """Texts as the tokenizer will meet them in training, for a tokenizer to be trained on.

    The operations of the config are run as far as `text` depends on them: captions are chosen and
    lower-cased, no image is decoded. Examples come in random order, at most five times each.

    Args:
      config: the data config of the training split.
      limit: the most texts to give.
      seed: of the choice.

    Raises:
      UserError: for a mistake in the config, or if the operations leave no string `text`.
    """
    config = as_plain(config)
    source = build_source(config)
    size = min(limit, 5 * len(source))
    positions = np.arange(size)
    order = Order(len(source), seed)
    if not config.get("preprocess") and not source.needs_tensorflow:
        if source.fields().get("text") != STRING:
            raise UserError("there is no string 'text' in data.arrays to train a tokenizer on")
        texts = source.column("text")[order.indices(positions)]
        yield from (text.decode("utf-8", "replace") for text in texts)
        return
    from vlp_jax.data import example_graph
    from vlp_jax.data.ops import build_ops

    ops = build_ops(config.get("preprocess"))
    graph = example_graph.ExampleGraph(source, ops, only=("text",))
    chunk = example_graph.CHUNK

    def plan(number: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = positions[number * chunk : (number + 1) * chunk]
        return order.indices(chosen), example_seeds(seed, chosen, len(ops))

    dataset = graph.dataset(plan, -(-size // chunk)).batch(chunk)
    for batch in example_graph.run(dataset):
        yield from (text.decode("utf-8", "replace") for text in batch["text"])

"""Reads the examples of one source in order, preprocessed; bad examples are left out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from typing import Any

import numpy as np

from vlp_jax.data.faults import Fault
from vlp_jax.data.order import BlockOrder, ExampleOrder, Order, example_seeds
from vlp_jax.data.sources import Source, build_source
from vlp_jax.data.sources.base import STRING, FieldSpec
from vlp_jax.data.sources.labels import WordClasses, listed
from vlp_jax.data.tokenizers import Tokenizer
from vlp_jax.errors import UserError, unknown_key_message

RAW_TEXT = "text_raw"  # the name of the extra field that holds `text` before it is tokenized
ORDERS = ("auto", "examples", "blocks")
LANES = 16
_log = logging.getLogger("vlp_jax.data")
_SUBSTITUTES = 40  # examples that are tried in the place of a bad one
_NEAR = 8  # the first of them come from the batches that follow
_PREFETCH_CHUNKS = 64  # how far ahead a source is told what will be read

# Number of a chunk -> positions in the order of the source, int64 [n].
Positions = Callable[[int], np.ndarray]
# Called with the number of a chunk, and the place and fault of each bad example in it.
OnFaults = Callable[[int, Sequence[tuple[int, Fault]]], None]


@dataclass(frozen=True)
class Chunk:
    """Preprocessed examples at n positions.

    `arrays` are [n, ...], with zeros and empty strings where `sound`, bool [n], is False: an
    example there is bad and not replaced.
    """

    arrays: dict[str, np.ndarray]
    sound: np.ndarray


class SourceReader:
    """Reads and preprocesses the examples of a data config.

    Args:
      config: see `vlp_jax.data.sources.build_source`, `ops.build_ops` and `make_order`.
      tokenizer: for `text`, and the fields that `tokenize` marks.
      shuffle: False takes the examples in the order of the source.
      extra_fields: further fields to keep, as `EvalPipeline` says.
    """

    def __init__(
        self,
        config: Mapping[str, Any],
        tokenizer: Tokenizer | None,
        *,
        seed: int,
        shuffle: bool,
        batch_size: int,
        extra_fields: Sequence[str] = (),
    ) -> None:
        self.source: Source = build_source(config)
        self.order = make_order(config, self.source, seed, shuffle, batch_size)
        self._preprocess = config.get("preprocess") or {}
        if self._preprocess:
            _check_names(self._preprocess, self.source)
        self._tokenizer = tokenizer
        self._seed = seed
        # The example that follows a batch later takes the place of a bad one: it lies near in the
        # files, and is not in the same batch already.
        self._stride = batch_size
        self._raw_text = RAW_TEXT in extra_fields
        self._extra_fields = [name for name in extra_fields if name != RAW_TEXT]
        if self._raw_text and self._outputs.get("text") != STRING:
            raise UserError(f"extra field {RAW_TEXT}: data.preprocess leaves no string 'text'")

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
        from vlp_jax.data.preprocess_graph import PreprocessGraph

        return PreprocessGraph(
            self.source,
            self._ops,
            self._extra_fields,
            tokenizer=self._tokenizer,
            raw_text=RAW_TEXT if self._raw_text else None,
        )

    @cached_property
    def _outputs(self) -> Mapping[str, FieldSpec]:
        """The fields of an example before its texts are tokenized."""
        if self._graph is not None:
            return self._graph.outputs
        specs = self.source.fields()
        for name in self._extra_fields:
            if name not in specs:
                raise UserError(f"extra fields: {unknown_key_message(name, specs, 'the example')}")
        kept = {"text", *self._extra_fields}
        return {name: spec for name, spec in specs.items() if spec.is_array or name in kept}

    @cached_property
    def arrays(self) -> dict[str, FieldSpec]:
        """The fields that are numbers, without the leading dimension."""
        if self._graph is not None:
            return {name: spec for name, spec in self._graph.results.items() if spec.is_array}
        arrays = {name: spec for name, spec in self._outputs.items() if spec.is_array}
        if self._outputs.get("text") == STRING and self._tokenizer is not None:
            arrays["text"] = FieldSpec((self._tokenizer.context_length,), np.dtype(np.int32))
        return arrays

    def indices_and_seeds(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The examples at positions, int64 [n], and their operations' seeds, int32 [n, ops, 2]."""
        seeds = example_seeds(self._seed, positions, len(self._ops))
        return self.order.indices(positions), seeds

    def chunks(
        self, positions: Positions, total: int | None, replace: bool, on_faults: OnFaults
    ) -> Iterator[Chunk]:
        """Yields `total` consecutive chunks (None: no end), prepared ahead of their use.

        Args:
          positions: a pure function; called from several threads.
          replace: whether another example takes the place of a bad one.
          on_faults: called for each chunk before it is yielded.
        """
        if self._graph is None:
            for number in count() if total is None else range(total):
                on_faults(number, ())
                yield self._from_arrays(positions(number))
            return

        def plan(number: int) -> tuple[np.ndarray, np.ndarray]:
            ahead = number + _PREFETCH_CHUNKS
            # Remote files take long to copy; the source begins while other chunks are prepared.
            if total is None or ahead < total:
                self.source.will_read(self.order.indices(positions(ahead)))
            return self.indices_and_seeds(positions(number))

        for number, (arrays, alive) in enumerate(self._graph.chunks(plan, total)):
            faults = self._faults(positions(number), alive)
            on_faults(number, faults)
            yield self._whole(positions(number), arrays, alive, replace)

    def _from_arrays(self, positions: np.ndarray) -> Chunk:
        record = self.source.fetch(self.order.indices(positions))
        arrays = {name: record[name] for name in self._outputs}
        if self._outputs.get("text") == STRING:
            text = arrays.pop("text")
            if self._raw_text:
                arrays[RAW_TEXT] = text
            if self._tokenizer is not None:
                arrays["text"] = self._tokenizer(list(text))
        return Chunk(arrays, np.ones(len(positions), bool))

    def _faults(self, positions: np.ndarray, alive: np.ndarray) -> list[tuple[int, Fault]]:
        """The place and fault of each example that is not `alive`."""
        missing = np.setdiff1d(np.arange(len(positions)), alive)
        if not missing.size:
            return []
        indices, seeds = self.indices_and_seeds(positions[missing])
        # An error in the graph of a chunk loses its text, so each bad example runs once more alone.
        faults = [self._graph.diagnose(int(i), s) for i, s in zip(indices, seeds, strict=True)]
        return list(zip(missing.tolist(), faults, strict=True))

    def _whole(
        self, positions: np.ndarray, arrays: dict[str, np.ndarray], alive: np.ndarray, replace: bool
    ) -> Chunk:
        """Builds a chunk of n examples from the k that could be used."""
        size = len(positions)
        # The usual case: nothing is copied.
        if len(alive) == size:
            return Chunk(self._graph.unpack(arrays), np.ones(size, bool))
        full = {
            name: np.full((size, *spec.shape), b"" if spec.is_string else 0, spec.dtype)
            for name, spec in self._graph.results.items()
        }
        for name, values in arrays.items():
            full[name][alive] = values
        missing = np.setdiff1d(np.arange(size), alive)
        sound = np.ones(size, bool)
        if replace:
            self._substitute(positions, missing, full)
        else:
            sound[missing] = False
        return Chunk(self._graph.unpack(full), sound)

    def _substitute(
        self, positions: np.ndarray, missing: np.ndarray, full: dict[str, np.ndarray]
    ) -> None:
        """Fills the places `missing` of `full` with other examples.

        Their operations get the seeds of the places, so that a resumed run makes the same choice.
        """
        left = missing
        for attempt in range(1, _SUBSTITUTES + 1):
            _, seeds = self.indices_and_seeds(positions[left])
            # The steps grow, because a whole file may be damaged.
            steps = min(attempt, _NEAR) * 2 ** max(0, attempt - _NEAR)
            others = self.order.indices(positions[left] + steps * self._stride)
            arrays, alive = self._graph.run_once(others, seeds)
            for name, values in arrays.items():
                full[name][left[alive]] = values
            left = np.delete(left, alive)
            if not left.size:
                return
        index = int(self.order.indices(positions[left[:1]])[0])
        fault = self._graph.diagnose(index, seeds[0])
        raise UserError(
            f"no example can be used: {_SUBSTITUTES + 1} were tried; the first is {fault.where} "
            f"({fault.reason})"
        )


def _check_names(preprocess: Mapping[str, Any] | Sequence[Any], source: Source) -> None:
    """Checks that `prompt_template` lists the classes as the words of a folder are numbered."""
    from vlp_jax.data.ops import in_order

    for arguments in [values for name, values in in_order(preprocess) if name == "prompt_template"]:
        known = source.class_names(arguments.get("field", "text"))
        names = arguments.get("names")
        if names and isinstance(known, WordClasses) and known != tuple(names):
            raise UserError(
                f"prompt_template: names are {listed(names)} by number, and the words of the data "
                f"are {listed(known)}: set data.label_names to the list of all words in that order"
            )


def make_order(
    config: Mapping[str, Any], source: Source, seed: int, shuffle: bool, batch_size: int
) -> ExampleOrder:
    """Chooses the order in which a source is read.

    Args:
      config: `order`, "examples" (any example may follow any other), "blocks" (see `BlockOrder`) or
        "auto" (whatever suits the files); `lanes`, how many places of the files are read side by
        side by all processes together (default 16, reduced to a divisor of the batch size); and
        `window`, how many blocks of each lane are mixed.
    """
    name, lanes = config.get("order", "auto"), config.get("lanes", LANES)
    window = config.get("window")
    if name not in ORDERS:
        raise UserError(unknown_key_message(str(name), ORDERS, "data.order"))
    for key, value in (("lanes", lanes), ("window", window)):
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and (not whole or value < 1):
            raise UserError(f"data.{key}={value!r} must be a whole number of at least 1")
    if not shuffle or name == "examples":
        return Order(len(source), seed, shuffle)
    blocks = source.blocks()
    if blocks is None:
        if name == "blocks":
            raise UserError("data.order='blocks', but this source has no blocks; use 'auto'")
        return Order(len(source), seed)
    lanes = math.gcd(lanes or LANES, batch_size)
    while lanes > len(blocks.sizes):
        lanes = next(n for n in range(lanes - 1, 0, -1) if batch_size % n == 0)
    # Each lane holds its open blocks, and the next one that it is about to open.
    needed = lanes * (1 + (window or blocks.window)) * blocks.memory
    if needed > blocks.room:
        _log.warning(
            "data: %d lanes hold up to %d MiB of row groups in memory, and data.cache_mib is %d: "
            "groups may be read several times; raise data.cache_mib, or lower data.lanes",
            *(lanes, needed >> 20, blocks.room >> 20),
        )
    mixed = (window or blocks.window) * int(blocks.sizes.mean())
    return BlockOrder(blocks.sizes, seed, lanes, max(1, mixed))

"""The TensorFlow graph that turns records of a source into preprocessed examples."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.faults import Fault
from vlp_jax.data.lazy_tensorflow import Op, tf
from vlp_jax.data.ops import apply_ops
from vlp_jax.data.sources.base import STRING, FieldSpec, Source
from vlp_jax.data.tokenizing import Framing, unmarked
from vlp_jax.errors import UserError, unknown_key_message

if TYPE_CHECKING:
    from vlp_jax.data.tokenizers import Tokenizer

_log = logging.getLogger("vlp_jax.data")
# Examples that are read in one call of Python, and go through their operations in one thread.
CHUNK = 256
READING_AHEAD = 4  # chunks whose records are read at a time
# UTF-16 without a byte order mark is valid UTF-8 for Latin letters: each second byte is 0.
_UTF16 = r"(?s)(?:[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]).*"


class PreprocessGraph:
    """Turns the records of examples into the fields that a batch holds, as a TensorFlow graph.

    Attributes:
      outputs: the fields after the operations. Numbers of a fixed shape, `text` and the fields that
        `tokenize` marks are kept, and further ones that `extra_fields` names.
      packed: extra fields that are lists. A batch of tensors cannot hold lists of several lengths,
        so each is one byte string, a serialized tensor, which `unpack` reads back.
      inputs: the fields of the source that the outputs depend on. No other field is read or
        decoded.
      texts: string fields of the source that captions or tokenized fields depend on.
      results: the fields that `chunk` gives: the outputs, with token ids for texts.
    """

    def __init__(
        self,
        source: Source,
        ops: Sequence[tuple[str, Op]],
        extra_fields: Sequence[str] = (),
        texts_only: bool = False,
        tokenizer: Tokenizer | None = None,
        raw_text: str | None = None,
    ) -> None:
        """Traces the operations once.

        Args:
          source, ops: the source, and operations as `build_ops` makes them.
          extra_fields: further fields to keep.
          texts_only: keep the texts that a tokenizer would get, as strings, and nothing else.
          tokenizer: of the texts; without one they are dropped.
          raw_text: the name under which `text` is kept as a string too; None drops it.
        """
        self._source, self._ops = source, ops
        self._tokenizer, self._raw_text = tokenizer, raw_text
        fields, traced = trace(source, ops)
        example, framings = unmarked(traced)
        specs = {name: spec_of(value) for name, value in example.items()}
        # Fields that nothing depends on are never read: a tokenizer is trained without the images.
        if texts_only:
            names = texts_to_tokenize(source, specs, framings)
        else:
            names = choose_outputs(specs, extra_fields, framings)
            if tokenizer is not None and not framings and "text" not in names:
                check_no_text(source, specs)
        if "text" in names and specs["text"] == STRING:
            framings.setdefault("text", Framing())
        self._tokenized_fields = tuple(framings)
        self._framings = {} if texts_only else framings
        self._set_inputs(fields, example, names)
        self.packed = {
            name: specs[name].dtype
            for name in names
            if specs[name].shape != () and not specs[name].is_array
        }
        self.outputs = {name: STRING if name in self.packed else specs[name] for name in names}
        self.results = self._results()
        # Shapes are not part of the signatures, so that they are traced once for all sizes.
        self._chunk_function = tf.function(self.chunk, autograph=False, reduce_retracing=True)
        self._example_function = tf.function(self.example, autograph=False, reduce_retracing=True)

    def _set_inputs(
        self, fields: Mapping[str, tf.Tensor], example: Mapping[str, tf.Tensor], names: list[str]
    ) -> None:
        """Finds the fields of the source that the outputs, and the texts, depend on."""
        reached = ancestors([example[name] for name in names])
        self.inputs = [name for name, value in fields.items() if value.op in reached]
        texts = ("text", "captions", *self._tokenized_fields)
        read = ancestors([example[name] for name in names if name in texts])
        self.texts = [
            name
            for name, value in fields.items()
            if value.op in read and value.dtype == tf.string and name != "image"
        ]

    def _results(self) -> dict[str, FieldSpec]:
        results = {k: spec for k, spec in self.outputs.items() if k not in self._framings}
        if self._raw_text is not None and "text" in self._framings:
            results[self._raw_text] = STRING
        if self._tokenizer is not None:
            for name, framing in self._framings.items():
                framing.check(self._tokenizer, name)
                length = framing.row_length(self._tokenizer)
                results[name] = FieldSpec((length,), np.dtype(np.int32))
        return results

    def example(self, record: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        """Preprocesses one example. The graph fails at an example that cannot be used."""
        unread = {
            name: _unread(spec)
            for name, spec in self._source.fields().items()
            if name not in self.inputs
        }
        example = {**self._source.parse(record, self.inputs), **unread}
        example |= {name: _checked_text(name, example[name]) for name in self.texts}
        example, _ = unmarked(apply_ops(self._ops, example, seeds))
        for name in self._tokenized_fields:
            full = tf.strings.length(tf.strings.strip(example[name])) > 0
            which = "text" if name == "text" else repr(name)
            # Also catches captions that operations such as `strip_urls` have emptied.
            example[name] = faults.require(
                example[name], full, faults.EMPTY_TEXT, f"its {which} is empty"
            )
        return {
            name: tf.io.serialize_tensor(example[name])
            if name in self.packed
            else tf.ensure_shape(example[name], spec.shape)
            for name, spec in self.outputs.items()
        }

    def chunk(
        self, records: dict[str, tf.Tensor], seeds: tf.Tensor
    ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
        """Preprocesses n examples; returns the k that can be used, and their places, int32 [k].

        A single thread goes through them, so several chunks should be under way at a time.
        """
        as_written = tf.autograph.experimental.do_not_convert
        count = tf.shape(seeds)[0]

        def numbered(
            record: dict[str, tf.Tensor], seeds: tf.Tensor, number: tf.Tensor
        ) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            record = dict(record)
            fault = record.pop(faults.FAULT, None)
            if fault is not None:
                number = faults.require_marked(number, tf.equal(fault, ""), fault)
            return self.example(record, seeds), number

        # A dataset inside of the graph of a chunk: `ignore_errors` drops the examples that fail,
        # and the rest are batched without going back to Python.
        rows = tf.data.Dataset.from_tensor_slices((records, seeds, tf.range(count)))
        done = rows.map(as_written(numbered)).ignore_errors()
        done = done.batch(tf.cast(tf.maximum(count, 1), tf.int64))
        nothing = {
            name: tf.zeros([0, *spec.shape], tf.as_dtype(spec.dtype))
            for name, spec in self.outputs.items()
        }
        # Where all examples fail the dataset is empty, and `get_single_element` needs an element.
        none = tf.data.Dataset.from_tensors((nothing, tf.zeros([0], tf.int32)))
        outputs, numbers = done.concatenate(none).take(1).get_single_element()
        return self._tokenized(outputs), numbers

    def _tokenized(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """Replaces the texts of several examples by token ids."""
        known = {name: value for name, value in outputs.items() if name not in self._framings}
        if self._raw_text is not None and "text" in self._framings:
            known[self._raw_text] = outputs["text"]
        tokenizer = self._tokenizer
        for name, framing in self._framings.items() if tokenizer is not None else ():
            rows = partial(framing.rows, tokenizer)
            ids = tf.numpy_function(rows, [outputs[name]], tf.int32, stateful=False)
            ids.set_shape([None, framing.row_length(tokenizer)])
            known[name] = ids
        return known

    def unpack(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Reads the packed fields of a batch, each into an object array [b] of arrays."""
        unpacked = dict(batch)
        for name, dtype in self.packed.items():
            rows = np.empty(len(batch[name]), object)
            for number, row in enumerate(batch[name]):
                # A bad example that was not replaced is an empty string.
                empty = np.zeros(0, dtype)
                rows[number] = tf.io.parse_tensor(row, tf.as_dtype(dtype)).numpy() if row else empty
            unpacked[name] = rows
        return unpacked

    def chunks(
        self, indices_and_seeds: Callable[[int], tuple[np.ndarray, np.ndarray]], total: int | None
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """Yields the results of `chunk` for `total` chunks (None: no end), prepared ahead.

        `indices_and_seeds` gives, for the number of a chunk, the examples to read, int64 [n], and
        their seeds, int32 [n, number of operations, 2]. Raises the exception that reading raised.
        """
        failures: list[Exception] = []
        try:
            yield from _run(self._dataset(indices_and_seeds, total, failures.append))
        except tf.errors.OpError:
            # TensorFlow keeps only the text of an exception in Python.
            if failures:
                raise failures[0] from None
            raise

    def _dataset(
        self,
        indices_and_seeds: Callable[[int], tuple[np.ndarray, np.ndarray]],
        chunks: int | None,
        failed: Callable[[Exception], None],
    ) -> tf.data.Dataset:
        """The dataset behind `chunks`; `failed` is called with the exception if reading fails."""

        def fetch(number: np.int64) -> list[np.ndarray]:
            try:
                indices, seeds = indices_and_seeds(int(number))
                return [*self._fetch(indices).values(), seeds]
            except Exception as error:
                failed(error)
                raise

        def read(number: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            specs = self._source.record_fields()
            types = [tf.as_dtype(spec.dtype) for spec in specs.values()]
            *columns, seeds = tf.numpy_function(fetch, [number], [*types, tf.int32], stateful=False)
            for column, spec in zip(columns, specs.values(), strict=True):
                column.set_shape([None, *spec.shape])
            seeds.set_shape([None, len(self._ops), 2])
            return dict(zip(specs, columns, strict=True)), seeds

        # AutoGraph would rewrite Python's `if` and `for` for the graph; they are to run at tracing.
        as_written = tf.autograph.experimental.do_not_convert
        numbers = tf.data.Dataset.range(np.iinfo(np.int64).max if chunks is None else chunks)
        records = numbers.map(
            as_written(read), num_parallel_calls=READING_AHEAD, deterministic=True
        )
        return records.map(
            as_written(self.chunk), num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )

    def run_once(
        self, indices: np.ndarray, seeds: np.ndarray
    ) -> tuple[dict[str, np.ndarray], np.ndarray]:
        records = {name: tf.constant(column) for name, column in self._fetch(indices).items()}
        outputs, numbers = self._chunk_function(records, tf.constant(seeds))
        return {name: value.numpy() for name, value in outputs.items()}, numbers.numpy()

    def diagnose(self, index: int, seeds: np.ndarray) -> Fault:
        """Finds out why `chunk` left an example out, by running it alone."""
        columns = self._fetch(np.array([index]))
        where = self._source.describe(index)
        fault = columns.pop(faults.FAULT, [b""])[0]
        if fault:
            reason, detail = faults.explain(fault.decode())
            return Fault(reason, f"{where}: {detail}")
        try:
            record = {name: tf.constant(column[0]) for name, column in columns.items()}
            self._example_function(record, tf.constant(seeds))
        except tf.errors.OpError as error:
            reason, detail = faults.explain(error.message or str(error))
            return Fault(reason, f"{where}: {detail}")
        return Fault(faults.UNREADABLE, f"{where}: it could not be read before, and now it can")

    def _fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        record = self._source.fetch(indices, self.inputs)
        return {name: record[name] for name in self._source.record_fields()}


def _run(dataset: tf.data.Dataset) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """Yields the elements of a dataset, prepared ahead of their use by threads of its own."""
    options = tf.data.Options()
    options.deterministic = True
    # The processors that this process may use, or all if the system does not say.
    own = getattr(os, "sched_getaffinity", lambda pid: range(os.cpu_count() or 1))
    options.threading.private_threadpool_size = len(own(0))
    # One operation on one example is too little work to share among threads.
    options.threading.max_intra_op_parallelism = 1
    yield from dataset.prefetch(2).with_options(options).as_numpy_iterator()


def _checked_text(name: str, text: tf.Tensor) -> tf.Tensor:
    """Removes byte order marks from strings of any shape; fails for strings that are not UTF-8."""
    text = tf.strings.regex_replace(text, r"\A\x{feff}", "")
    replaced = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")
    sound = (replaced == text) & ~tf.strings.regex_full_match(text, _UTF16)
    detail = f"its {name!r} is not UTF-8: convert it"
    return faults.require(text, tf.reduce_all(sound), faults.MALFORMED_TEXT, detail)


def _unread(spec: FieldSpec) -> tf.Tensor:
    """A placeholder for a field that no output depends on, so that operations may pass it along."""
    nothing = b"" if spec.is_string else spec.dtype.type(0)
    nothing = tf.fill([dim or 0 for dim in spec.shape], nothing)
    return tf.raw_ops.PlaceholderWithDefault(input=nothing, shape=spec.shape)


def choose_outputs(
    specs: Mapping[str, FieldSpec], extra_fields: Sequence[str], tokenized: Collection[str] = ()
) -> list[str]:
    """Chooses the fields of batches: numbers of a fixed shape, `text`, extra and tokenized ones."""
    for name in extra_fields:
        if name not in specs:
            raise UserError(f"extra fields: {unknown_key_message(name, specs, 'the example')}")
    image = specs.get("image")
    if image is not None and not image.is_array and "image" not in extra_fields:
        state = "still encoded" if image.is_string else f"of no fixed shape {image.shape}"
        raise UserError(
            f"after data.preprocess, 'image' is {state}: it needs decode_image and then "
            f"random_resized_crop, resize or resize_shortest_and_center_crop (or keep without it)"
        )
    return [
        name
        for name, spec in specs.items()
        if spec.is_array
        or name in extra_fields
        or name in tokenized
        or (name == "text" and spec == STRING)
    ]


def trace(
    source: Source, ops: Sequence[tuple[str, Op]]
) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """Traces the operations; returns the source's fields as placeholders, and the results."""
    traced: list[dict[str, tf.Tensor]] = []

    def process(fields: dict[str, tf.Tensor], seeds: tf.Tensor) -> None:
        traced.extend([fields, apply_ops(ops, fields, seeds, source.look_for)])

    # Placeholders get names that no field can have: names of fields may hold slashes and dots.
    tf.function(process, autograph=False).get_concrete_function(
        {
            name: tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), name=f"field{number}")
            for number, (name, spec) in enumerate(source.fields().items())
        },
        tf.TensorSpec([len(ops), 2], tf.int32, name="seeds"),
    )
    fields, example = traced
    return fields, example


def texts_to_tokenize(
    source: Source, specs: Mapping[str, FieldSpec], marked: Collection[str]
) -> list[str]:
    """The fields that a tokenizer gets: those that `tokenize` marks, and else a string `text`."""
    names = [*marked]
    if "text" not in names and specs.get("text") == STRING:
        names.append("text")
    if not names:
        check_no_text(source, specs)
        raise UserError(f"data.preprocess leaves no field 'text', only {sorted(specs)}")
    return names


def check_no_text(source: Source, specs: Mapping[str, FieldSpec]) -> None:
    """Warns, or refuses, if there is no text to tokenize for a reason that can be a mistake."""
    if "text" in specs and specs["text"].is_string:
        raise UserError(
            "after data.preprocess, 'text' is a list of strings and not one: let "
            '"choose_text": {"field": "text"} in data.preprocess take one of them'
        )
    why = "" if "text" in specs else source.look_for("text")
    if why:
        _log.warning("data: there is no 'text' for the tokenizer: %s", why)


def spec_of(value: tf.Tensor) -> FieldSpec:
    """Reads shape and dtype of a traced field."""
    if value.shape.rank is None:
        raise UserError(f"after data.preprocess, a field has no known rank: {value.name}")
    return FieldSpec(tuple(value.shape), np.dtype(value.dtype.as_numpy_dtype))


def ancestors(tensors: Sequence[tf.Tensor]) -> set[Any]:
    """The TensorFlow operations that `tensors` depend on."""
    waiting = [tensor.op for tensor in tensors]
    reached = set(waiting)
    while waiting:
        op = waiting.pop()
        new = {tensor.op for tensor in op.inputs} | set(op.control_inputs)
        waiting.extend(new - reached)
        reached |= new
    return reached

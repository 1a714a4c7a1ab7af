"""The TensorFlow side of the pipeline: from the records of a source to batches of examples."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data import faults
from vlp_jax.data.fault_log import Fault
from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.data.ops import apply_ops
from vlp_jax.data.sources.base import STRING, FieldSpec, Source
from vlp_jax.errors import UserError, unknown_key_message

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Op
    from vlp_jax.data.tokenizers import Tokenizer

_log = logging.getLogger("vlp_jax.data")
# Examples that are read in one call of Python, and go through their operations in one thread.
CHUNK = 256
READING_AHEAD = 4  # chunks whose records are read at a time
# UTF-16 without a byte order mark: of Latin letters every second byte is 0, which is valid UTF-8.
_UTF16 = r"(?s)(?:[^\x00]\x00[^\x00]\x00|\x00[^\x00]\x00[^\x00]).*"


class ExampleGraph:
    """Turns the records of examples into the fields that a batch holds, as a TensorFlow graph.

    Attributes:
      outputs: the fields of the result. All fields that are numbers of a fixed shape are kept, and
        `text`; of the others only those that `extra_fields` names. A field of `extra_fields` that
        is a list is one byte string, a serialized tensor, for `unpack` to read back.
      inputs: the fields of the source that the outputs depend on; no others are read or decoded.
      packed: the fields that are serialized so.
      texts: the string fields of the source that `text` or `captions` of the result depend on.
      results: what `chunk` gives of each example: the outputs with `text` tokenized.
    """

    def __init__(
        self,
        source: Source,
        ops: Sequence[tuple[str, Op]],
        extra_fields: Sequence[str] = (),
        only: Sequence[str] | None = None,
        tokenizer: Tokenizer | None = None,
        raw_text: str | None = None,
    ) -> None:
        """Traces the operations once.

        Args:
          only: names the outputs instead of the rule above.
          tokenizer: for a string `text`, which is dropped without one unless `only` names it.
          raw_text: under which name the text itself is kept, if at all.

        Raises:
          UserError: for an output that the operations do not leave, or not as batches need it.
        """
        self._source, self._ops = source, ops
        self._tokenizer, self._raw_text = tokenizer, raw_text
        fields, example = _trace(source, ops)
        specs = {name: _spec(value) for name, value in example.items()}
        names = choose_outputs(specs, extra_fields) if only is None else list(only)
        for name in names:
            if name not in specs:
                raise UserError(f"data.preprocess leaves no field {name!r}, only {sorted(specs)}")
        reached = _ancestors([example[name] for name in names])
        if tokenizer is not None and only is None and "text" not in names:
            _check_no_text(source, specs)
        self.inputs = [name for name, value in fields.items() if value.op in reached]
        read = _ancestors([example[name] for name in names if name in ("text", "captions")])
        self.texts = [
            name
            for name, value in fields.items()
            if value.op in read and value.dtype == import_tensorflow().string and name != "image"
        ]
        self.packed = {
            name: specs[name].dtype
            for name in names
            if specs[name].shape != () and not specs[name].is_array
        }
        self.outputs = {name: STRING if name in self.packed else specs[name] for name in names}
        self.results = dict(self.outputs)
        if only is None and self.results.get("text") == STRING:
            del self.results["text"]
            if raw_text is not None:
                self.results[raw_text] = STRING
            if tokenizer is not None:
                ids = FieldSpec((tokenizer.context_length,), np.dtype(np.int32))
                self.results["text"] = ids

    def example(self, record: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        """One example, without its leading dimension. Fails where it cannot be used."""
        tf = import_tensorflow()
        unread = {
            name: _unread(spec)
            for name, spec in self._source.fields().items()
            if name not in self.inputs
        }
        example = {**self._source.parse(record, self.inputs), **unread}
        example |= {name: _checked_text(name, example[name]) for name in self.texts}
        example = apply_ops(self._ops, example, seeds)
        if "text" in self.outputs and self.outputs["text"] == STRING:
            full = tf.strings.length(tf.strings.strip(example["text"])) > 0
            example["text"] = faults.require(
                example["text"], full, faults.EMPTY_TEXT, "its text is empty"
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
        """Those of n examples that can be used, [k, ...], and which they are, int32 [k].

        One thread goes through them, so many chunks are to be under way at a time.
        """
        tf = import_tensorflow()
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

        rows = tf.data.Dataset.from_tensor_slices((records, seeds, tf.range(count)))
        done = rows.map(as_written(numbered)).ignore_errors()
        done = done.batch(tf.cast(tf.maximum(count, 1), tf.int64))
        nothing = {
            name: tf.zeros([0, *spec.shape], tf.as_dtype(spec.dtype))
            for name, spec in self.outputs.items()
        }
        none = tf.data.Dataset.from_tensors((nothing, tf.zeros([0], tf.int32)))
        outputs, numbers = done.concatenate(none).take(1).get_single_element()
        return self._tokenized(outputs), numbers

    def _tokenized(self, outputs: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        """The results from the outputs of several examples."""
        tf = import_tensorflow()
        known = {**outputs}
        if "text" in outputs and self.results.get("text") != self.outputs["text"]:
            text = known.pop("text")
            if self._raw_text is not None:
                known[self._raw_text] = text
            if self._tokenizer is not None:
                ids = tf.numpy_function(self._tokenizer, [text], tf.int32, stateful=False)
                ids.set_shape([None, self._tokenizer.context_length])
                known["text"] = ids
        return known

    def unpack(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Reads the packed fields of a batch back, each into an object array [b] of arrays."""
        tf = import_tensorflow()
        unpacked = dict(batch)
        for name, dtype in self.packed.items():
            rows = np.empty(len(batch[name]), object)
            for number, row in enumerate(batch[name]):
                # An example that could not be used has left nothing to parse.
                empty = np.zeros(0, dtype)
                rows[number] = tf.io.parse_tensor(row, tf.as_dtype(dtype)).numpy() if row else empty
            unpacked[name] = rows
        return unpacked

    def chunks(
        self,
        indices_and_seeds: Callable[[int], tuple[np.ndarray, np.ndarray]],
        total: int | None,
    ) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
        """What `chunk` makes of consecutive chunks, in order, prepared ahead of their use.

        Args:
          indices_and_seeds: for the number of a chunk, the examples to read, int64 [n], and their
            seeds, int32 [n, number of operations, 2].
          total: how many; None for no end.

        Raises:
          Exception: whatever reading raised.
        """
        failures: list[Exception] = []
        try:
            yield from _run(self._dataset(indices_and_seeds, total, failures.append))
        except import_tensorflow().errors.OpError:
            # TensorFlow keeps of an exception in Python no more than its text.
            if failures:
                raise failures[0] from None
            raise

    def _dataset(
        self,
        indices_and_seeds: Callable[[int], tuple[np.ndarray, np.ndarray]],
        chunks: int | None,
        failed: Callable[[Exception], None],
    ) -> tf.data.Dataset:
        """`chunks`, to be run; `failed` is told of what reading raised."""
        tf = import_tensorflow()

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

        # AutoGraph rewrites Python's `if` and `for`, of which none here is meant for the graph.
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
        """What `chunk` makes of a few examples, at once."""
        tf = import_tensorflow()
        records = {name: tf.constant(column) for name, column in self._fetch(indices).items()}
        outputs, numbers = self._chunk_function(records, tf.constant(seeds))
        return {name: value.numpy() for name, value in outputs.items()}, numbers.numpy()

    def diagnose(self, index: int, seeds: np.ndarray) -> Fault:
        """Why an example that `chunk` left out cannot be used.

        Args:
          seeds: int32 [number of operations, 2].
        """
        tf = import_tensorflow()
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

    @cached_property
    def _chunk_function(self) -> Any:
        # Shapes are not part of the signature, so that it is traced once for all sizes.
        return import_tensorflow().function(self.chunk, autograph=False, reduce_retracing=True)

    @cached_property
    def _example_function(self) -> Any:
        return import_tensorflow().function(self.example, autograph=False, reduce_retracing=True)


def _run(dataset: tf.data.Dataset) -> Iterator[tuple[dict[str, np.ndarray], np.ndarray]]:
    """The elements of a dataset, prepared ahead of their use by threads of its own."""
    tf = import_tensorflow()
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = _processors()
    # One operation on one example is too little work to share among threads.
    options.threading.max_intra_op_parallelism = 1
    yield from dataset.prefetch(2).with_options(options).as_numpy_iterator()


def _processors() -> int:
    """How many this process may use; of all there are, where the system does not say."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def choose_outputs(specs: Mapping[str, FieldSpec], extra_fields: Sequence[str]) -> list[str]:
    """The fields that batches hold: numbers of a fixed shape, `text`, and the extra ones.

    Raises:
      UserError: for an extra field that does not exist, or an image that cannot be stacked.
    """
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
        if spec.is_array or name in extra_fields or (name == "text" and spec == STRING)
    ]


def _trace(
    source: Source, ops: Sequence[tuple[str, Op]]
) -> tuple[dict[str, tf.Tensor], dict[str, tf.Tensor]]:
    """The fields of a source, as placeholders, and what the operations make of them."""
    tf = import_tensorflow()
    traced: list[dict[str, tf.Tensor]] = []

    def process(fields: dict[str, tf.Tensor], seeds: tf.Tensor) -> None:
        traced.extend([fields, apply_ops(ops, fields, seeds, source.look_for)])

    tf.function(process, autograph=False).get_concrete_function(
        {
            name: tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), name=f"field{number}")
            for number, (name, spec) in enumerate(source.fields().items())
        },
        tf.TensorSpec([len(ops), 2], tf.int32, name="seeds"),
    )
    fields, example = traced
    return fields, example


def _check_no_text(source: Source, specs: Mapping[str, FieldSpec]) -> None:
    """Says why there is no text to tokenize, if that can be a mistake; a task may need none.

    Raises:
      UserError: there are several.
    """
    if "text" in specs and specs["text"].is_string:
        raise UserError(
            "after data.preprocess, 'text' is a list of strings and not one: let "
            '"choose_text": {"field": "text"} in data.preprocess take one of them'
        )
    why = "" if "text" in specs else source.look_for("text")
    if why:
        _log.warning("data: there is no 'text' for the tokenizer: %s", why)


def _checked_text(name: str, text: tf.Tensor) -> tf.Tensor:
    """UTF-8 strings of any shape, without a byte order mark at their heads; fails for others."""
    tf = import_tensorflow()
    text = tf.strings.regex_replace(text, r"\A\x{feff}", "")
    replaced = tf.strings.unicode_transcode(text, "UTF-8", "UTF-8", errors="replace")
    sound = (replaced == text) & ~tf.strings.regex_full_match(text, _UTF16)
    detail = f"its {name!r} is not UTF-8: convert it"
    return faults.require(text, tf.reduce_all(sound), faults.MALFORMED_TEXT, detail)


def _unread(spec: FieldSpec) -> tf.Tensor:
    """A stand-in for a field that no output depends on, so that operations may pass it along."""
    tf = import_tensorflow()
    nothing = tf.fill(
        [dim or 0 for dim in spec.shape], b"" if spec.is_string else spec.dtype.type(0)
    )
    return tf.raw_ops.PlaceholderWithDefault(input=nothing, shape=spec.shape)


def _spec(value: tf.Tensor) -> FieldSpec:
    if value.shape.rank is None:
        raise UserError(f"after data.preprocess, a field has no known rank: {value.name}")
    return FieldSpec(tuple(value.shape), np.dtype(value.dtype.as_numpy_dtype))


def _ancestors(tensors: Sequence[tf.Tensor]) -> set[Any]:
    """All operations that `tensors` depend on."""
    waiting = [tensor.op for tensor in tensors]
    reached = set(waiting)
    while waiting:
        op = waiting.pop()
        new = {tensor.op for tensor in op.inputs} | set(op.control_inputs)
        waiting.extend(new - reached)
        reached |= new
    return reached

"""The TensorFlow side of the pipeline: from the records of a source to batches of examples."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.data.ops import apply_ops
from vlp_jax.data.sources.base import STRING, FieldSpec, Source
from vlp_jax.errors import UserError, unknown_key_message

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Op
    from vlp_jax.data.tokenizers import Tokenizer

# Records of so many examples are read in one call of Python.
CHUNK = 256


class ExampleGraph:
    """Turns the record of one example into the fields that a batch holds, as a TensorFlow graph.

    Attributes:
      outputs: the fields of the result. All fields that are numbers of a fixed shape are kept, and
        `text`; of the others only those that `extra_fields` names. A field of `extra_fields` that
        is a list is one byte string, a serialized tensor, for `unpack` to read back.
      inputs: the fields of the source that the outputs depend on; no others are read or decoded.
      packed: the fields that are serialized so.
    """

    def __init__(
        self,
        source: Source,
        ops: Sequence[tuple[str, Op]],
        extra_fields: Sequence[str] = (),
        only: Sequence[str] | None = None,
    ) -> None:
        """`only` names the outputs instead of the rule above."""
        self._source, self._ops = source, ops
        fields, example = _trace(source, ops)
        specs = {name: _spec(value) for name, value in example.items()}
        names = choose_outputs(specs, extra_fields) if only is None else list(only)
        for name in names:
            if name not in specs:
                raise UserError(f"data.preprocess leaves no field {name!r}, only {sorted(specs)}")
        reached = _ancestors([example[name] for name in names])
        self.inputs = [name for name, value in fields.items() if value.op in reached]
        self.packed = {
            name: specs[name].dtype
            for name in names
            if specs[name].shape != () and not specs[name].is_array
        }
        self.outputs = {name: STRING if name in self.packed else specs[name] for name in names}

    def __call__(self, record: dict[str, tf.Tensor], seeds: tf.Tensor) -> dict[str, tf.Tensor]:
        tf = import_tensorflow()
        unread = {
            name: _unread(spec)
            for name, spec in self._source.fields().items()
            if name not in self.inputs
        }
        example = {**self._source.parse(record, self.inputs), **unread}
        example = apply_ops(self._ops, example, seeds)
        return {
            name: tf.io.serialize_tensor(example[name])
            if name in self.packed
            else tf.ensure_shape(example[name], spec.shape)
            for name, spec in self.outputs.items()
        }

    def unpack(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Reads the packed fields of a batch back, each into an object array [b] of arrays."""
        tf = import_tensorflow()
        unpacked = dict(batch)
        for name, dtype in self.packed.items():
            rows = np.empty(len(batch[name]), object)
            for number, row in enumerate(batch[name]):
                rows[number] = tf.io.parse_tensor(row, tf.as_dtype(dtype)).numpy()
            unpacked[name] = rows
        return unpacked

    def dataset(
        self, indices_and_seeds: Callable[[int], tuple[np.ndarray, np.ndarray]], chunks: int | None
    ) -> tf.data.Dataset:
        """The examples of consecutive chunks, in order, each through all operations.

        Args:
          indices_and_seeds: for the number of a chunk, the examples to read, int64 [n], and their
            seeds, int32 [n, number of operations, 2].
          chunks: how many; None for no end.
        """
        tf = import_tensorflow()
        specs = self._source.record_fields()
        seed_shape = [None, len(self._ops), 2]

        def fetch(chunk: np.int64) -> list[np.ndarray]:
            indices, seeds = indices_and_seeds(int(chunk))
            record = self._source.fetch(indices)
            return [*(record[name] for name in specs), seeds]

        def read(chunk: tf.Tensor) -> tuple[dict[str, tf.Tensor], tf.Tensor]:
            types = [tf.as_dtype(spec.dtype) for spec in specs.values()]
            *columns, seeds = tf.numpy_function(fetch, [chunk], [*types, tf.int32], stateful=False)
            for column, spec in zip(columns, specs.values(), strict=True):
                column.set_shape([None, *spec.shape])
            seeds.set_shape(seed_shape)
            return dict(zip(specs, columns, strict=True)), seeds

        read = tf.autograph.experimental.do_not_convert(read)
        numbers = tf.data.Dataset.range(np.iinfo(np.int64).max if chunks is None else chunks)
        examples = numbers.map(read, num_parallel_calls=2, deterministic=True).unbatch()
        # AutoGraph rewrites Python's `if` and `for`, of which none here is meant for the graph.
        process = tf.autograph.experimental.do_not_convert(self.__call__)
        return examples.map(process, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)

    def find_culprit(self, indices: np.ndarray, seeds: np.ndarray) -> str | None:
        """Says which of these examples cannot be processed and why; None if all can."""
        tf = import_tensorflow()
        process = tf.function(self.__call__, autograph=False)
        for number in range(len(indices)):
            columns = self._source.fetch(indices[number : number + 1])
            record = {name: tf.constant(column[0]) for name, column in columns.items()}
            try:
                process(record, tf.constant(seeds[number]))
            except tf.errors.OpError as error:
                return f"{self._source.describe(int(indices[number]))}: {_first_line(error)}"
        return None


def run(dataset: tf.data.Dataset) -> Iterator[dict[str, np.ndarray]]:
    """The batches of a dataset, prepared ahead of their use by threads of its own."""
    tf = import_tensorflow()
    options = tf.data.Options()
    options.deterministic = True
    options.threading.private_threadpool_size = os.cpu_count() or 1
    # One operation on one example is too little work to share among threads.
    options.threading.max_intra_op_parallelism = 1
    yield from dataset.prefetch(2).with_options(options).as_numpy_iterator()


def tokenize(
    dataset: tf.data.Dataset, tokenizer: Tokenizer | None, raw_name: str | None
) -> tf.data.Dataset:
    """Replaces the strings `text` of batches by token ids, and keeps them under `raw_name`."""
    tf = import_tensorflow()

    def replace(batch: dict[str, tf.Tensor]) -> dict[str, tf.Tensor]:
        batch = dict(batch)
        text = batch.pop("text")
        if raw_name is not None:
            batch[raw_name] = text
        if tokenizer is not None:
            ids = tf.numpy_function(tokenizer, [text], tf.int32, stateful=False)
            ids.set_shape([None, tokenizer.context_length])
            batch["text"] = ids
        return batch

    return dataset.map(tf.autograph.experimental.do_not_convert(replace))


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
        traced.extend([fields, apply_ops(ops, fields, seeds)])

    tf.function(process, autograph=False).get_concrete_function(
        {
            name: tf.TensorSpec(spec.shape, tf.as_dtype(spec.dtype), name=f"field{number}")
            for number, (name, spec) in enumerate(source.fields().items())
        },
        tf.TensorSpec([len(ops), 2], tf.int32, name="seeds"),
    )
    fields, example = traced
    return fields, example


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


def _first_line(error: Exception) -> str:
    """A TensorFlow error in one line, without the names of graph nodes and operations."""
    message = getattr(error, "message", None) or str(error)
    message = re.sub(r"\{\{[^}]*\}\}\s*|\s*\[Op:[^]]*\].*", "", message).strip()
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__

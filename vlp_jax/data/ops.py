"""Preprocessing: plain functions on one example, looked up by name in the table `OPS`.

An operation is a function (example, seed) -> example on a flat dict of tensors. Its only
randomness is the seed, int32 [2], that it is given: a function of the run's seed, the position in
the stream and the operation's place. A new operation is a function here or in a module beside
this one, and one line in `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vlp_jax.data import text_ops, tokenizing
from vlp_jax.data.faults import MISSING_FIELD, require
from vlp_jax.data.image_ops import augment, crop, decode, rand_augment
from vlp_jax.data.image_ops.fields import check_count
from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError, check_arguments, unknown_key_message
from vlp_jax.preprocess import labelled, name_and_number


def keep(fields: Sequence[str]) -> Op:
    """Drops all fields but some.

    Args:
      fields: the names of the fields that stay.
    """
    names = (fields,) if isinstance(fields, str) else tuple(fields)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        return {name: example[name] for name in names}

    return apply


def pad_rows(fields: Sequence[str], count: int, fill: float = 0) -> Op:
    """Brings lists of numbers to one length, so that batches can hold them.

    Args:
      fields: number fields [n, ...], such as ["boxes", "labels"].
      count: rows of the result, [count, ...]. Rows beyond them are cut off.
      fill: the number in the rows that are added.

    Raises:
      UserError: a count that is none, or a field that is no list of numbers.
    """
    if isinstance(fields, str) or not fields or not all(isinstance(f, str) for f in fields):
        raise UserError(f"pad_rows: fields is a list of names of fields, got {fields!r}")
    check_count("pad_rows", count, "count", "rows")
    if isinstance(fill, bool) or not isinstance(fill, int | float):
        raise UserError(f"pad_rows: fill must be a number, got {fill!r}")

    def padded(example: Example, name: str) -> tf.Tensor:
        rows = example[name]
        number = rows.dtype.is_floating or rows.dtype.is_integer
        if not number or not rows.shape.rank or None in tuple(rows.shape)[1:]:
            raise UserError(
                f"pad_rows: {name!r} is no list of numbers: it is {rows.dtype.name} "
                f"{tuple(rows.shape)}"
            )
        rows = rows[:count]
        added = [[0, count - tf.shape(rows)[0]], *[[0, 0]] * (rows.shape.rank - 1)]
        rows = tf.pad(rows, added, constant_values=tf.cast(fill, rows.dtype))
        return tf.ensure_shape(rows, [count, *rows.shape[1:]])

    def apply(example: Example, seed: tf.Tensor) -> Example:
        return {**example, **{name: padded(example, name) for name in fields}}

    return apply


def choose_question(
    index: int | None = None,
    question: str = "questions/question",
    answer: str = "questions/answer_label",
    kind: str | None = "questions/kind",
) -> Op:
    """Sets `text` to one of an example's questions, and `answer` and `kind` to match.

    Without `index` the choice is made anew in every epoch, each with the same chance.

    Args:
      index: which of them. An example that has fewer cannot be used.
      question: field with the questions, strings [k].
      answer: field with the number of each answer in the list of all answers, [k].
      kind: field with the number of the kind of each question, [k]; None if there are no kinds.

    Raises:
      UserError: an index that is none.
    """
    if index is not None and (isinstance(index, bool) or not isinstance(index, int) or index < 0):
        raise UserError(f"choose_question: index must be None or a number from 0, got {index!r}")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        texts = example[question]
        if texts.dtype != tf.string or texts.shape.rank != 1:
            raise UserError(f"choose_question: field {question!r} is no list of strings")
        count = tf.size(texts)
        wanted = 0 if index is None else index
        # The seed is a uniform random number already.
        chosen = tf.math.floormod(seed[0], tf.maximum(count, 1)) if index is None else index
        chosen = require(
            tf.convert_to_tensor(chosen), count > wanted, MISSING_FIELD,
            f"there is no question {wanted}",
        )  # fmt: skip
        found = {"text": texts[chosen], "answer": _number(example, answer, chosen)}
        if kind is not None:
            found["kind"] = _number(example, kind, chosen)
        return {**example, **found}

    return apply


def _number(example: Example, name: str, chosen: tf.Tensor) -> tf.Tensor:
    """Entry `chosen` of a list of whole numbers, int32."""
    numbers = example[name]
    if not numbers.dtype.is_integer or numbers.shape.rank != 1:
        raise UserError(f"choose_question: field {name!r} is no list of whole numbers")
    return tf.cast(numbers[chosen], tf.int32)


# In the order in which a mapping in a config runs them; a sequence runs in its own.
OPS: dict[str, Callable[..., Op]] = {
    op.__name__: op
    for op in (
        *(text_ops.choose_text, choose_question),
        *(text_ops.clean_text, text_ops.prompt_template, text_ops.canonicalize_text),
        *(text_ops.lowercase, text_ops.truncate_text),
        *(decode.decode_image, crop.random_resized_crop, crop.resize),
        *(crop.resize_shortest_and_random_crop, crop.resize_shortest_and_center_crop),
        *(augment.flip_left_right, augment.random_rotation, augment.random_translation),
        *(rand_augment.rand_augment, augment.color_jitter, augment.grayscale),
        *(augment.solarize, augment.gaussian_blur, augment.random_erasing),
        *(pad_rows, tokenizing.tokenize, keep),
    )
}


def build_ops(preprocess: Mapping[str, Any] | Sequence[Any] | None) -> list[tuple[str, Op]]:
    """Builds the operations that a config's `preprocess` names, in the order in which they run.

    Args:
      preprocess: a sequence of (name in `OPS`, keyword arguments) pairs, which run as written; or a
        mapping of labels ("resize", "resize#2") to keyword arguments, which run in the order of
        `OPS`. None or empty for none. See `vlp_jax.preprocess`.

    Raises:
      UserError: for an unknown operation or argument, or a value that the operation refuses.
    """
    ops = []
    for label, arguments in _in_order(preprocess):
        name = name_and_number(label)[0]
        check_arguments(OPS[name], arguments, f"data.preprocess.{label}")
        ops.append((name, OPS[name](**arguments)))
    return crop.fuse(in_order(preprocess), ops)


def in_order(
    preprocess: Mapping[str, Any] | Sequence[Any] | None,
) -> list[tuple[str, dict[str, Any]]]:
    """(name, keyword arguments) of the operations of a config, in the order in which they run."""
    return [(name_and_number(label)[0], given) for label, given in _in_order(preprocess)]


def _in_order(
    preprocess: Mapping[str, Any] | Sequence[Any] | None,
) -> list[tuple[str, dict[str, Any]]]:
    """(label, keyword arguments); raises UserError for an unknown operation."""
    plain = as_plain(preprocess or {})
    found, places = labelled(plain), {}
    for label in found:
        name, number = name_and_number(label)
        if name not in OPS:
            raise UserError(unknown_key_message(name, OPS, "data.preprocess"))
        places[label] = (list(OPS).index(name), number)
    labels = sorted(places, key=places.__getitem__) if isinstance(plain, Mapping) else places
    return [(label, as_plain(found[label])) for label in labels]


class _Fields(dict):
    """An example whose missing fields are a mistake in the config, not a KeyError."""

    def __init__(self, fields: Mapping[str, Any], op: str, why: Callable[[str], str]) -> None:
        super().__init__(fields)
        self._op, self._why = op, why

    def __missing__(self, key: str) -> Any:
        message = unknown_key_message(key, self, "the fields of the example")
        why = self._why(key)
        raise UserError(f"data.preprocess.{self._op}: {message}" + (f"; {why}" if why else ""))


def apply_ops(
    ops: Sequence[tuple[str, Op]],
    example: Example,
    seeds: tf.Tensor,
    why: Callable[[str], str] = lambda name: "",
) -> Example:
    """Runs operations one after the other on an example, field name -> tensor.

    Args:
      seeds: int32 [len(ops), 2].
      why: says of a field that is not there why it is not, if anything is known.

    Raises:
      UserError: if an operation needs a field that is not there, or not of its type.
    """
    for number, (name, op) in enumerate(ops):
        example = op(_Fields(example, name, why), seeds[number])
    return dict(example)

"""Operations on fields that hold a list of rows, such as the boxes of an image."""

from __future__ import annotations

from collections.abc import Sequence

from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.errors import UserError


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
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise UserError(f"pad_rows: count must be a whole number of rows above 0, got {count!r}")
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

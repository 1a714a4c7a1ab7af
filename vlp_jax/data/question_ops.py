"""Questions about an image and their answers, inside a tf.data graph."""

from __future__ import annotations

from vlp_jax.data.faults import MISSING_FIELD, require
from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.errors import UserError


def choose_question(
    index: int | None = None,
    question: str = "questions/question",
    answer: str = "questions/answer_label",
    kind: str | None = "questions/kind",
) -> Op:
    """Sets `text` to one of an example's questions, `answer` and `kind` to what goes with it.

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

"""Operations that move pixels: mirroring, rotation, translation, on uint8 RGB [h, w, 3]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vlp_jax.data.image_ops.checks import decoded_image
from vlp_jax.data.lazy_tensorflow import import_tensorflow
from vlp_jax.errors import UserError

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Example, Op


def flip_left_right(unless_text: str | None = r"\b(left|right)\b") -> Op:
    """Mirrors half of the images, but none whose `text` the pattern occurs in.

    Args:
      unless_text: a regular expression (RE2), matched anywhere in `text` and in any case; None
        mirrors half of all images.
    """
    pattern = None
    if unless_text is not None:
        tf = import_tensorflow()
        # \C is any byte: a dot would stop at text that is not valid UTF-8.
        pattern = rf"(?is)\C*(?:{unless_text})\C*"
        try:
            tf.strings.regex_full_match("", pattern)
        except tf.errors.InvalidArgumentError:
            reason = f"{unless_text!r} is not a regular expression of RE2"
            raise UserError(f"flip_left_right: unless_text={reason}") from None

    def apply(example: Example, seed: tf.Tensor) -> Example:
        tf = import_tensorflow()
        image = decoded_image(example, "flip_left_right")
        flip = tf.random.stateless_uniform([], seed) < 0.5
        if pattern is not None:
            if "text" not in example or example["text"].dtype != tf.string:
                raise UserError(
                    "flip_left_right: there is no string 'text' to match unless_text with; put "
                    "choose_text before it, or set unless_text to None"
                )
            flip &= ~tf.strings.regex_full_match(example["text"], pattern)
        flipped = tf.cond(flip, lambda: tf.reverse(image, [1]), lambda: image)
        return {**example, "image": tf.ensure_shape(flipped, image.shape)}

    return apply

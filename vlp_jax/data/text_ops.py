"""Text operations on an example's `text`, inside a tf.data graph.

Strings are UTF-8. Each public function checks its settings and returns the operation, a function
(example, seed) -> example whose only randomness is the seed, int32 [2]; `vlp_jax.data.ops` lists
them for configs.
"""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.data.faults import EMPTY_TEXT, MISSING_FIELD, require
from vlp_jax.data.lazy_tensorflow import Example, Op, tf
from vlp_jax.data.sources.base import as_plain
from vlp_jax.data.templates import Templates
from vlp_jax.data.tokenizing import Marked
from vlp_jax.errors import UserError

# Regular expressions of RE2, in which \s and \w are ASCII alone. White space is everything that
# Python's str.split splits at.
_SPACES = r"[\t-\r\x1c-\x20\x{85}\p{Z}]+"
_CONTROL = r"[\x00-\x08\x0e-\x1b\x7f-\x{84}\x{86}-\x{9f}\x{feff}]"
_URL = r"(?i)\b(https?://|www\.)[!-~]+"
_PUNCTUATION = r"[!-/:-@\[-`{-~]"  # Python's string.punctuation
_PLAIN = r"[\t-\r -%'-~]*"  # ASCII without "&": nothing to repair or to resolve


def choose_text(
    field: str | None = None,
    index: int | None = None,
    weights: Sequence[float] | None = None,
    fields: Mapping[str, float] | None = None,
) -> Op:
    """Sets `text` to one of an example's captions.

    A caption that is empty or white space is not chosen if there is another. Without `index` the
    choice is made anew in every epoch, each of the k with the same chance if nothing else is said.

    Args:
      field: a string field, [] or [k]; by default "captions".
      index: which of the k; the next that is not empty if that one is.
      weights: for each place in the list how often it is chosen, in proportion; those behind the
        last have weight 0. One of weight 0 is taken only if all others are empty.
      fields: instead of `field`, several with how often each is chosen, in proportion: say
        {"alt_text": 1, "synthetic_captions": 3}. All captions of a list share its weight.

    Raises:
      UserError: settings that exclude each other, or weights that are no weights.
    """
    if fields is not None and (field, index, weights) != (None, None, None):
        raise UserError("choose_text: fields excludes field, index and weights")
    if index is not None and weights is not None:
        raise UserError("choose_text: index excludes weights")
    if index is not None and (not isinstance(index, int) or index < 0):
        raise UserError(f"choose_text: index must be None or a number from 0, got {index!r}")
    shares = None if fields is None else _weights("fields", as_plain(fields).values())
    names = ("captions" if field is None else field,) if fields is None else tuple(fields)
    places = None if weights is None else _weights("weights", weights)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        lists = [_strings(example, name) for name in names]
        if len(lists) == 1 and example[names[0]].shape.rank == 0:
            return {**example, "text": example[names[0]]}
        texts = tf.concat(lists, 0)
        texts = require(texts, tf.size(texts) > 0, EMPTY_TEXT, "there is no caption")
        if index is not None:
            chosen = _first_from(texts, index)
        elif shares is None and places is None:
            chosen = _uniform(texts, seed)
        else:
            own = _of_lists(lists, shares) if places is None else _of_places(texts, places)
            chosen = _weighted(texts, own, seed)
        return {**example, "text": texts[chosen]}

    return apply


def clean_text(
    fix_unicode: bool = True,
    unescape_html: bool = True,
    strip_control: bool = True,
    strip_urls: bool = False,
    collapse_whitespace: bool = True,
) -> Op:
    """Cleans `text`, in this order.

    Args:
      fix_unicode: repairs text that was decoded wrongly, and makes quotation marks, ligatures and
        wide characters plain (ftfy.fix_text, with NFC).
      unescape_html: resolves entities, twice, as CLIP does ("&amp;quot;").
      strip_control: removes control characters that are not white space, and byte order marks.
      strip_urls: removes what begins with http://, https:// or www., up to the next character that
        is not ASCII and visible.
      collapse_whitespace: every run of white space (Unicode's) becomes one space, none at the ends.
    """
    # At this point `locals` holds the arguments and nothing else.
    for name, value in list(locals().items()):
        if not isinstance(value, bool):
            raise UserError(f"clean_text: {name} must be True or False, got {value!r}")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        text = _scalar(example, "clean_text")
        if fix_unicode or unescape_html:
            # A call of Python costs more than all other steps, and most texts need no repair.
            plain = tf.strings.regex_full_match(text, _PLAIN if fix_unicode else r"[^&]*")
            repaired = _in_python(text, _repair(fix_unicode, unescape_html))
            text = tf.cond(plain, lambda: text, repaired)
        if strip_control:
            text = tf.strings.regex_replace(text, _CONTROL, "")
        if strip_urls:
            text = tf.strings.regex_replace(text, _URL, "")
        return {**example, "text": _collapsed(text) if collapse_whitespace else text}

    return apply


def canonicalize_text() -> Op:
    """Turns `text` into lower case without punctuation, one space between words.

    Source: google-research/big_vision, evaluators/proj/image_text/prompt_engineering.py,
    `canonicalize_text`, which SigLIP and LiT use: an underscore is a space, the other punctuation
    of ASCII is removed.
    """

    def apply(example: Example, seed: tf.Tensor) -> Example:
        text = tf.strings.regex_replace(_scalar(example, "canonicalize_text"), "_", " ")
        text = tf.strings.regex_replace(text, _PUNCTUATION, "")
        return {**example, "text": _collapsed(_lower(text))}

    return apply


def lowercase() -> Op:
    """Turns `text` into lower case (Unicode's mapping, with a final sigma); NUL characters go."""

    def apply(example: Example, seed: tf.Tensor) -> Example:
        return {**example, "text": _lower(_scalar(example, "lowercase"))}

    return apply


def prompt_template(
    templates: Sequence[str] | str,
    field: str = "text",
    names: Sequence[str] | None = None,
    index: int | None = None,
) -> Op:
    """Sets `text` to a template that is filled in, such as "a photo of a {}.".

    Args:
      templates: "{}" stands for `field`, "{name}" for another field of the example, a string or a
        number; "{{" for a brace.
      field: what "{}" stands for: a string, or the number of a class.
      names: the names of the classes, if `field` is a number; without them it is written in digits.
      index: which of the templates; None takes one at random, anew in every epoch.

    Raises:
      UserError: a template without a place to fill in, or an index that is not there.
    """
    filled = Templates.parse((templates,) if isinstance(templates, str) else templates, field)
    count = len(filled.texts)
    if index is not None and (not isinstance(index, int) or not 0 <= index < count):
        raise UserError(
            f"prompt_template: index must be None or 0 to {count - 1}, the number of a template, "
            f"got {index!r}"
        )
    if names is not None and (isinstance(names, str) or not names):
        raise UserError(f"prompt_template: names is a list of the names of classes, got {names!r}")
    if names is not None and field not in filled.fields:
        raise UserError(f"prompt_template: names is set, but no template has {{}} for {field!r}")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        values = [_as_string(example, n, names if n == field else None) for n in filled.fields]
        chosen = tf.math.floormod(seed[0], count) if index is None else index
        return {**example, "text": filled.fill(chosen, values)}

    return apply


def truncate_text(
    max_words: int | None = None, max_chars: int | None = None, where: str = "end"
) -> Op:
    """Cuts `text` to `max_words` words and then to `max_chars` characters.

    Args:
      max_words: words are what white space (Unicode's) separates; in what is cut, one space does.
      max_chars: characters are Unicode's code points.
      where: "end" cuts off the end; "random" keeps a window that the seed places.
    """
    for name, value in (("max_words", max_words), ("max_chars", max_chars)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise UserError(f"truncate_text: {name} must be None or a number from 1, got {value!r}")
    if max_words is None and max_chars is None:
        raise UserError("truncate_text: set max_words or max_chars")
    if where not in ("end", "random"):
        raise UserError(f"truncate_text: where must be 'end' or 'random', got {where!r}")

    def apply(example: Example, seed: tf.Tensor) -> Example:
        text = _scalar(example, "truncate_text")
        share = tf.zeros([2]) if where == "end" else tf.random.stateless_uniform([2], seed)
        if max_words is not None:
            words = tf.strings.split(_collapsed(text))
            begin = _begin(share[0], tf.size(words) - max_words)
            window = words[begin : begin + max_words]
            text = tf.where(
                tf.size(words) > max_words, tf.strings.reduce_join(window, separator=" "), text
            )
        if max_chars is not None:
            begin = _begin(share[1], tf.strings.length(text, unit="UTF8_CHAR") - max_chars)
            text = tf.strings.substr(text, begin, max_chars, unit="UTF8_CHAR")
        return {**example, "text": text}

    return apply


def _weights(name: str, values: Any) -> np.ndarray:
    """Converts weights to shares of 1, float32 [n]."""
    try:
        weights = np.asarray(list(values), np.float64)
    except (TypeError, ValueError):
        weights = np.zeros(0)
    if not weights.size or not np.isfinite(weights).all() or weights.min() < 0 or not weights.sum():
        raise UserError(f"choose_text: {name} must be numbers from 0, not all 0, got {values!r}")
    return (weights / weights.sum()).astype(np.float32)


def _strings(example: Example, name: str) -> tf.Tensor:
    """A string field as a list, [k]."""
    texts = example[name]
    if texts.dtype != tf.string or texts.shape.rank not in (0, 1):
        raise UserError(f"choose_text: field {name!r} holds no strings")
    return tf.reshape(texts, [1]) if texts.shape.rank == 0 else texts


def _scalar(example: Example, op: str) -> tf.Tensor:
    text = example["text"]
    if isinstance(text, Marked):
        raise UserError(f"{op}: 'text' is tokenized already; put {op} before tokenize")
    if text.dtype != tf.string or text.shape.rank != 0:
        raise UserError(f"{op}: 'text' is no string; choose_text makes one of a list")
    return text


def _shown(texts: tf.Tensor) -> tf.Tensor:
    """Whether each text holds more than white space, bool [k]."""
    return tf.strings.length(tf.strings.regex_replace(texts, _SPACES, "")) > 0


def _visible(texts: tf.Tensor) -> tf.Tensor:
    """`_shown`, or True for all texts if none is shown."""
    shown = _shown(texts)
    return shown | ~tf.reduce_any(shown)


def _uniform(texts: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The place of one of the visible texts, each with the same chance."""
    candidates = tf.reshape(tf.where(_visible(texts)), [-1])
    # The seed is a uniform random number already.
    return candidates[tf.math.floormod(seed[0], tf.size(candidates))]


def _first_from(texts: tf.Tensor, index: int) -> tf.Tensor:
    """The first visible text from `index` on, and from the beginning after the end."""
    texts = require(texts, tf.size(texts) > index, EMPTY_TEXT, f"there is no caption {index}")
    order = tf.math.floormod(tf.range(tf.size(texts)) + index, tf.size(texts))
    return order[tf.argmax(tf.gather(_visible(texts), order))]


def _of_places(texts: tf.Tensor, weights: np.ndarray) -> tf.Tensor:
    """The weight of each text by its place, float32 [k]."""
    size = tf.size(texts)
    behind = tf.zeros([tf.maximum(size - len(weights), 0)])
    return tf.concat([tf.constant(weights)[:size], behind], 0)


def _of_lists(lists: Sequence[tf.Tensor], weights: np.ndarray) -> tf.Tensor:
    """The weight of each text: its list's weight, shared among the visible texts of the list."""
    parts = []
    for texts, weight in zip(lists, weights, strict=True):
        shown = _shown(texts)
        count = tf.math.count_nonzero(shown, dtype=tf.float32)
        parts.append(tf.cast(shown, tf.float32) * tf.math.divide_no_nan(float(weight), count))
    return tf.concat(parts, 0)


def _weighted(texts: tf.Tensor, weights: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """The place of one of the visible texts, by their weights, or evenly if these are all 0."""
    visible = tf.cast(_visible(texts), tf.float32)
    weights = weights * visible
    weights = tf.where(tf.reduce_sum(weights) > 0, weights, visible)
    ends = tf.cumsum(weights)
    point = tf.random.stateless_uniform([], seed) * tf.reduce_sum(weights)
    # Rounding may take the product to the very end, where there is no text.
    last = tf.reduce_max(tf.where(weights > 0))
    return tf.minimum(tf.math.count_nonzero(ends <= point), last)


def _as_string(example: Example, name: str, names: Sequence[str] | None) -> tf.Tensor:
    """A field as a scalar string; a number by its name, if there are names."""
    value = example[name]
    if value.shape.rank != 0:
        raise UserError(f"prompt_template: field {name!r} is neither a string nor a number")
    if names is None:
        return value if value.dtype == tf.string else tf.strings.as_string(value)
    if not value.dtype.is_integer:
        raise UserError(f"prompt_template: names is set, but field {name!r} is no whole number")
    known = (value >= 0) & (tf.cast(value, tf.int64) < len(names))
    detail = tf.strings.join([f"{name} ", tf.strings.as_string(value), " has no name"])
    number = require(tf.cast(value, tf.int64), known, MISSING_FIELD, detail)
    return tf.gather(tf.constant(list(names)), number)


def _begin(share: tf.Tensor, most: tf.Tensor) -> tf.Tensor:
    """The begin of a window, 0 to `most`, for a random number in [0, 1)."""
    most = tf.maximum(most, 0)
    return tf.minimum(tf.cast(share * tf.cast(most + 1, tf.float32), tf.int32), most)


def _lower(text: tf.Tensor) -> tf.Tensor:
    # TensorFlow takes a NUL for the end of the text.
    return tf.strings.lower(tf.strings.regex_replace(text, r"\x00", ""), encoding="utf-8")


def _collapsed(text: tf.Tensor) -> tf.Tensor:
    """Replaces white space as Python's `" ".join(text.split())` does."""
    return tf.strings.strip(tf.strings.regex_replace(text, _SPACES, " "))


def _repair(fix_unicode: bool, unescape_html: bool) -> Callable[[bytes], bytes]:
    def repair(text: bytes) -> bytes:
        result = text.decode("utf-8", "replace")
        if fix_unicode:
            import ftfy

            result = ftfy.fix_text(result, unescape_html="auto" if unescape_html else False)
        if unescape_html:
            result = html.unescape(html.unescape(result))
        return result.encode("utf-8", "replace")

    return repair


def _in_python(text: tf.Tensor, function: Callable[[bytes], bytes]) -> Callable[[], tf.Tensor]:
    """A branch of tf.cond in which a Python function computes on the text."""

    def branch() -> tf.Tensor:
        result = tf.numpy_function(function, [text], tf.string, stateful=False)
        result.set_shape([])
        return result

    return branch

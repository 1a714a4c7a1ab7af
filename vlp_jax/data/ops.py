"""Preprocessing: plain functions on one example, looked up by name in the table `OPS`.

An operation is a function (example, seed) -> example on a flat dict of tensors. Its only
randomness is the seed, int32 [2], that it is given: a function of the run's seed, the position in
the stream and the operation's place. A new operation is a function here or in a module beside
this one, and one line in `OPS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vlp_jax.data import image_ops, question_ops, row_ops, text_ops, tokenizing
from vlp_jax.data.sources.base import as_plain
from vlp_jax.errors import UserError, check_arguments, unknown_key_message
from vlp_jax.preprocess import labelled, name_and_number

if TYPE_CHECKING:
    import tensorflow as tf

    from vlp_jax.data.lazy_tensorflow import Example, Op


def keep(fields: Sequence[str]) -> Op:
    """Drops all fields but some.

    Args:
      fields: the names of the fields that stay.
    """
    names = (fields,) if isinstance(fields, str) else tuple(fields)

    def apply(example: Example, seed: tf.Tensor) -> Example:
        del seed
        return {name: example[name] for name in names}

    return apply


# In the order in which a mapping in a config runs them; a sequence runs in its own.
OPS: dict[str, Callable[..., Op]] = {
    "choose_text": text_ops.choose_text,
    "choose_question": question_ops.choose_question,
    "clean_text": text_ops.clean_text,
    "prompt_template": text_ops.prompt_template,
    "canonicalize_text": text_ops.canonicalize_text,
    "lowercase": text_ops.lowercase,
    "truncate_text": text_ops.truncate_text,
    "decode_image": image_ops.decode_image,
    "random_resized_crop": image_ops.random_resized_crop,
    "resize": image_ops.resize,
    "resize_shortest_and_random_crop": image_ops.resize_shortest_and_random_crop,
    "resize_shortest_and_center_crop": image_ops.resize_shortest_and_center_crop,
    "flip_left_right": image_ops.flip_left_right,
    "random_rotation": image_ops.random_rotation,
    "random_translation": image_ops.random_translation,
    "rand_augment": image_ops.rand_augment,
    "color_jitter": image_ops.color_jitter,
    "grayscale": image_ops.grayscale,
    "solarize": image_ops.solarize,
    "gaussian_blur": image_ops.gaussian_blur,
    "random_erasing": image_ops.random_erasing,
    "pad_rows": row_ops.pad_rows,
    "tokenize": tokenizing.tokenize,
    "keep": keep,
}


def build_ops(preprocess: Mapping[str, Any] | Sequence[Any] | None) -> list[tuple[str, Op]]:
    """The operations that a config's `preprocess` names, in the order in which they run.

    Args:
      preprocess: a sequence of (name in `OPS`, keyword arguments) pairs, which run as written; or a
        mapping of labels ("resize", "resize#2") to keyword arguments, which run in the order of
        `OPS`. None or empty for none. See `vlp_jax.preprocess`.

    Raises:
      UserError: for an unknown operation or argument, or a value that the operation refuses.
    """
    labels, pairs = _in_order(preprocess)
    ops = [(n, _build(k, n, v)) for k, (n, v) in zip(labels, pairs, strict=True)]
    return image_ops.fuse(pairs, ops)


def in_order(
    preprocess: Mapping[str, Any] | Sequence[Any] | None,
) -> list[tuple[str, dict[str, Any]]]:
    """(name, keyword arguments) of the operations of a config, in the order in which they run.

    Args:
      preprocess: as `build_ops` takes it.

    Raises:
      UserError: for an unknown operation.
    """
    return _in_order(preprocess)[1]


def _in_order(
    preprocess: Mapping[str, Any] | Sequence[Any] | None,
) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """The labels of operations, and their names and arguments."""
    plain = as_plain(preprocess or {})
    found = {label: as_plain(arguments) for label, arguments in labelled(plain).items()}
    places = {}
    for label in found:
        name, number = name_and_number(label)
        if name not in OPS:
            raise UserError(unknown_key_message(name, OPS, "data.preprocess"))
        places[label] = (list(OPS).index(name), number)
    labels = sorted(found, key=places.__getitem__) if isinstance(plain, Mapping) else list(found)
    return labels, [(name_and_number(label)[0], found[label]) for label in labels]


def _build(label: str, name: str, arguments: Mapping[str, Any]) -> Op:
    check_arguments(OPS[name], arguments, f"data.preprocess.{label}")
    return OPS[name](**arguments)


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
    """Runs operations one after the other.

    Args:
      ops: from `build_ops`.
      example: field name -> tensor.
      seeds: int32 [len(ops), 2].
      why: says of a field that is not there why it is not, if anything is known.

    Raises:
      UserError: if an operation needs a field that is not there, or not of its type.
    """
    for number, (name, op) in enumerate(ops):
        example = op(_Fields(example, name, why), seeds[number])
    return dict(example)

"""The fields of an example after its operations, found by tracing the graph."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import Op, tf
from vlp_jax.data.ops import apply_ops
from vlp_jax.data.sources.base import STRING, FieldSpec, Source
from vlp_jax.errors import UserError, unknown_key_message

_log = logging.getLogger("vlp_jax.data")


def choose_outputs(
    specs: Mapping[str, FieldSpec], extra_fields: Sequence[str], tokenized: Collection[str] = ()
) -> list[str]:
    """Chooses the fields of batches: numbers of a fixed shape, `text`, extra and tokenized fields.

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

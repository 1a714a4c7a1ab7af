"""Templates of texts, such as "a photo of a {}, {style}", as tables that a graph can look up."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.errors import UserError


@dataclass(frozen=True)
class Templates:
    """Templates in parts: part i of a template is a text and then the value of a slot.

    Attributes:
      texts: of each template the texts, all of the same number; "" behind its last.
      slots: of each template the place in `fields` that follows each text, or len(fields) for none.
      fields: the names of the fields that the templates use.
    """

    texts: tuple[tuple[str, ...], ...]
    slots: tuple[tuple[int, ...], ...]
    fields: tuple[str, ...]

    @classmethod
    def parse(cls, templates: Sequence[str], default: str) -> Templates:
        """Takes templates apart; "{}" stands for the field `default`."""
        if not templates:
            raise UserError("prompt_template: templates is empty")
        parts = [_parts(template, default) for template in templates]
        fields = tuple(sorted({name for row in parts for _, name in row if name is not None}))
        length = max(map(len, parts))
        # A graph looks templates up in rectangular tables, so all need the same number of parts.
        padded = [row + [("", None)] * (length - len(row)) for row in parts]
        places = {name: i for i, name in enumerate(fields)} | {None: len(fields)}
        return cls(
            texts=tuple(tuple(text for text, _ in row) for row in padded),
            slots=tuple(tuple(places[name] for _, name in row) for row in padded),
            fields=fields,
        )

    def fill(self, index: tf.Tensor | int, values: Sequence[tf.Tensor]) -> tf.Tensor:
        """Fills template `index` with `values`, scalar strings in the order of `fields`."""
        texts = tf.gather(tf.constant(self.texts), index)
        chosen = tf.gather(
            tf.stack([*values, tf.constant("")]), tf.gather(tf.constant(self.slots), index)
        )
        return tf.strings.reduce_join(tf.stack([texts, chosen], axis=1))


def _parts(template: str, default: str) -> list[tuple[str, str | None]]:
    """Splits a template into pairs of a text and the field behind it, None for none."""
    where = f"prompt_template: template {template!r}"
    if not isinstance(template, str):
        raise UserError(f"{where} is no text")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from None
    if any(conversion or form for _, _, form, conversion in parsed):
        raise UserError(f"{where}: a place is {{}} or {{field}}, without a format")
    parts = [(text, default if name == "" else name) for text, name, _, _ in parsed]
    if all(name is None for _, name in parts):
        raise UserError(f"{where} has no place to fill in: write {{}} or {{field}}")
    return parts

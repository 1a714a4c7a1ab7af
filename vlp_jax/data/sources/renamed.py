"""Names of fields: a config's `fields`, and the usual names of image-text data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vlp_jax.data.sources.base import FieldSpec, Names, Source, WrappedSource, as_plain
from vlp_jax.errors import UserError, unknown_key_message

# Names that writers of image-text data use for our fields, the most common first.
USUAL = {
    "image": ("image", "jpg", "jpeg", "png", "webp", "image_bytes", "image/encoded", "img"),
    "text": ("text", "caption", "txt", "TEXT", "image/caption"),
    "captions": ("captions", "json.captions"),
    "label": ("label", "cls"),
    "id": ("id", "key", "__key__", "image_id"),
}


def usual_names(source: Source, others: bool) -> dict[str, str]:
    """Maps our names to the source's, for the usual fields that the source has.

    Args:
      others: whether to take the other fields too, under their own names. Where fields were seen in
        some records alone, not every record need have them, and what is taken must be there.

    Raises:
      UserError: there is none; it says which fields there are.
    """
    known = list(source.fields())
    chosen = {}
    for ours, usual in USUAL.items():
        present = [name for name in usual if name in known]
        if present:
            chosen[ours] = present[0]
    if not chosen:
        listed = ", ".join(sorted(known))
        why = next(filter(None, map(source.look_for, ("image", "text"))), "set data.fields")
        raise UserError(f"none of the data's fields has a usual name ({listed}): {why}")
    # A field that became one of ours is not taken again under its own name.
    left = set(known) - set(chosen) - set(chosen.values()) if others else ()
    return {**chosen, **{name: name for name in known if name in left}}


def rename(source: Source, names: Mapping[str, str] | None) -> Source:
    """`source` with the fields that a config's `fields` names, and no others.

    Args:
      names: name in an example -> name in the source; None leaves the source as it is.

    Raises:
      UserError: for a field that the source does not have; it says which exist.
    """
    if names is None:
        return source
    names = as_plain(names)
    if not isinstance(names, Mapping) or not names:
        raise UserError(f"data.fields={names!r} must say which field of an example is which")
    for ours, theirs in names.items():
        if not isinstance(theirs, str):
            raise UserError(
                f"data.fields.{ours}={theirs!r} must name one field of the data, such as "
                f"data.fields.{ours}={next(iter(source.fields()))}"
            )
        why = source.look_for(theirs)
        if theirs not in source.fields():
            where = f"the data's fields (data.fields.{ours})"
            unknown = unknown_key_message(theirs, source.fields(), where)
            raise UserError(f"data.fields.{ours}={theirs!r}: {why}" if why else unknown)
    return Renamed(source, dict(names))


@dataclass(frozen=True, eq=False)
class Renamed(WrappedSource):
    """The fields of another source under other names; `names` maps ours to theirs."""

    names: Mapping[str, str]

    @property
    def needs_tensorflow(self) -> bool:
        # Records that are examples have the source's names, so that they are to be parsed.
        return self.source.needs_tensorflow or any(k != v for k, v in self.names.items())

    def fields(self) -> dict[str, FieldSpec]:
        known = self.source.fields()
        return {ours: known[theirs] for ours, theirs in self.names.items()}

    def look_for(self, name: str) -> str:
        return self.source.look_for(self.names.get(name, name))

    def _theirs(self, names: Names) -> list[str]:
        wanted = self.names if names is None else names
        return list(dict.fromkeys(self.names[name] for name in wanted))

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        return self.source.fetch(indices, self._theirs(names))

    def parse(self, record: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
        example = self.source.parse(record, self._theirs(names))
        return {name: example[self.names[name]] for name in names}

    def column(self, name: str) -> np.ndarray:
        return self.source.column(self.names[name])

    def class_names(self, field: str) -> tuple[str, ...] | None:
        return self.source.class_names(self.names.get(field, field))

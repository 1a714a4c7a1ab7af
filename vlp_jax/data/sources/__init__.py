"""Sources of examples. A new format is one file here and one line in `SOURCES`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from vlp_jax.data.sources.base import Blocks, FieldSpec, Names, Source, WrappedSource, as_plain
from vlp_jax.errors import UserError, unknown_key_message

__all__ = ["COMMON_KEYS", "SOURCES", "FieldSpec", "Source", "Subset", "build_source"]

# name -> (module, class); imported when asked for, because some of them import TensorFlow.
SOURCES: dict[str, tuple[str, str]] = {
    "array_record": ("vlp_jax.data.sources.records", "ArrayRecordSource"),
    "arrays": ("vlp_jax.data.sources.arrays", "ArraysSource"),
    "folder": ("vlp_jax.data.sources.folder", "FolderSource"),
    "parquet": ("vlp_jax.data.sources.parquet", "ParquetSource"),
    "tfds": ("vlp_jax.data.sources.tfds", "TfdsSource"),
    "tfrecord": ("vlp_jax.data.sources.records", "TFRecordSource"),
    "webdataset": ("vlp_jax.data.sources.webdataset", "WebDatasetSource"),
}
# Sources whose fields have the names of whoever wrote the files.
FOREIGN_NAMES = ("array_record", "parquet", "tfrecord", "webdataset")

# Keys of a data config that every source has, and that are not fields of its dataclass. Those
# behind `fields` are read by the pipeline.
COMMON_KEYS = (
    *("source", "where", "limit", "fields"),
    *("preprocess", "batch_ops", "order", "lanes", "window", "max_bad_fraction"),
)


def build_source(config: Mapping[str, Any]) -> Source:
    """Builds the source that a data config describes, narrowed by its `where` and `limit`.

    Args:
      config: `source`, a name in `SOURCES`; the fields of its dataclass; and `COMMON_KEYS`. `where`
        maps scalar fields to the value that they must have (a class may be given by its name),
        `limit` keeps the first examples after that, `fields` maps the names that fields shall have
        to names in the data. Without `fields`, files with names of their own give the usual ones
        (`USUAL`) and others if a manifest or `features` declares them.

    Raises:
      UserError: for an unknown name, key or field, and for what the source itself refuses.
    """
    config = as_plain(config)
    name = config.get("source")
    if name not in SOURCES:
        raise UserError(f"data.source: {unknown_key_message(str(name), SOURCES, 'sources')}")
    module, class_name = SOURCES[name]
    cls = getattr(import_module(module), class_name)
    known = {field.name: field for field in dataclasses.fields(cls)}
    # A source that knows what is missing before it reads takes `max_bad_fraction` too.
    keys = {k: value for k, value in config.items() if k in known or k not in COMMON_KEYS}
    for key in keys:
        if key not in known:
            where = f"data (source {name!r})"
            raise UserError(unknown_key_message(key, [*known, *COMMON_KEYS], where))
    for key, field in known.items():
        if key not in keys and field.default is dataclasses.MISSING:
            raise UserError(f"data.{key} is not set, and source {name!r} needs it")
    source = cls(**keys)
    source.fields()  # sources of files look at their first records here
    names = config.get("fields")
    if names is None and name in FOREIGN_NAMES:
        names = usual_names(source, others=getattr(source, "fields_are_declared", False))
    return select(rename(source, names), config.get("where"), config.get("limit"))


def select(source: Source, where: Mapping[str, Any] | None, limit: int | None) -> Source:
    """Selects the examples whose fields have the values in `where`, the first `limit`."""
    whole = isinstance(limit, int) and not isinstance(limit, bool)
    if limit is not None and (not whole or limit < 1):
        raise UserError(f"data.limit={limit!r} must be a whole number of at least 1")
    if where:
        # Whole columns: which examples match must be known before their order is.
        kept = np.ones(len(source), bool)
        for name, value in where.items():
            wanted = _wanted(source, name, value)
            values = source.column(name)  # masked where a record lacks it
            kept &= (np.ma.getdata(values) == wanted) & ~np.ma.getmaskarray(values)
        indices = np.flatnonzero(kept)
        if not indices.size:
            raise UserError(f"data.where={dict(where)} matches none of {len(source)} examples")
    elif limit is not None and limit < len(source):
        indices = np.arange(limit)
    else:
        return source
    return Subset(source, indices[:limit])


def _wanted(source: Source, name: str, value: Any) -> Any:
    """The value to compare field `name` with: class names as numbers, strings as bytes."""
    fields = source.fields()
    scalars = [field for field, spec in fields.items() if spec.shape == ()]
    if name not in scalars:
        raise UserError(f"data.where: {unknown_key_message(name, scalars, 'the scalar fields')}")
    if isinstance(value, str):
        if fields[name].is_string:
            return value.encode()
        names = source.class_names(name)
        if names is None:
            raise UserError(f"data.where.{name}={value!r} is a string, but {name} holds numbers")
        if value not in names:
            known = f"the classes of {name}"
            raise UserError(f"data.where: {unknown_key_message(value, names, known)}")
        return names.index(value)
    if fields[name].is_string or not isinstance(value, bool | int | float | np.generic):
        raise UserError(f"data.where.{name}={value!r} cannot be compared with the field {name}")
    return value


@dataclasses.dataclass(frozen=True, eq=False)
class Subset(WrappedSource):
    """The examples of another source at `indices`, int64 [n], in rising order."""

    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def fetch(self, indices: np.ndarray, names: Names = None) -> dict[str, np.ndarray]:
        return self.source.fetch(self.indices[indices], names)

    def column(self, name: str) -> np.ndarray:
        return self.source.column(name)[self.indices]

    def describe(self, index: int) -> str:
        return self.source.describe(int(self.indices[index]))

    def fingerprint(self) -> str:
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        return f"{self.source.fingerprint()}[{chosen}]"

    def blocks(self) -> Blocks | None:
        """The other source's blocks, without the examples that are not in the subset."""
        whole = self.source.blocks()
        if whole is None:
            return None
        ends = np.searchsorted(self.indices, np.cumsum(whole.sizes))
        sizes = np.diff(ends, prepend=0)
        return dataclasses.replace(whole, sizes=sizes[sizes > 0])

    def will_read(self, indices: np.ndarray) -> None:
        self.source.will_read(self.indices[indices])


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

    With `others`, the other fields are taken too, under their own names. Where fields were seen in
    some records alone, not every record need have them, and what is taken must be there.
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
    """`source` with the fields that `names` maps to its own alone; None leaves it as it is."""
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

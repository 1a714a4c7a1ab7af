"""Files of tf.train.Example records: TFRecord and ArrayRecord shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.sources.base import Blocks, FieldSpec
from vlp_jax.data.sources.manifest import find_pieces
from vlp_jax.data.sources.records import ArrayRecordFiles, RecordFiles, RecordSource, TFRecordFiles
from vlp_jax.errors import UserError, unknown_key_message

DTYPES = {"bytes": np.dtype(object), "int64": np.dtype(np.int64), "float32": np.dtype(np.float32)}
BLOCK, WINDOW = 256, 4  # records of one file that are read together, and such blocks at a time
_LOOKED_AT = 20  # records that are looked at to see which features there are
_FURTHER = 1024  # of all records, where a config names a feature that the first ones lack
_COLUMN_CHUNK = 1024


@dataclass(frozen=True)
class TFRecordSource(RecordSource):
    """tf.train.Example records in TFRecord files, gzipped or not.

    The fields are the examples' features under their own names; `features` of img2dataset's files
    are key, jpg, caption, url, width, height and so on.

    Attributes:
      path: files, patterns with "*" and brace ranges, a folder, on disk or scheme://; or the
        manifest of prepared data.
      features: name -> "bytes", "int64" or "float32" for one value, "bytes[]" and so on for a
        list; None looks at the manifest, or at the first records.
      cache_dir: where indexes and copies of remote files are kept; None: ~/.cache/vlp_jax/data.
      cache_gib: room for the copies.

    Raises:
      UserError: for files that are not there, or hold no example.
    """

    path: str | Sequence[str]
    features: Mapping[str, str] | None = None
    cache_dir: str | None = None
    cache_gib: float = 64.0

    kind: ClassVar[str] = "tfrecord"
    suffix: ClassVar[tuple[str, ...]] = (".tfrecord", ".tfrecord.gz")
    reader: ClassVar[type] = TFRecordFiles

    def __post_init__(self) -> None:
        _ = self._features

    @cached_property
    def _found(self) -> Any:
        return find_pieces(self.path, self.suffix, self.kind)

    @cached_property
    def files(self) -> RecordFiles:
        return self.reader(self._found[0], cache_dir=self.cache_dir, cache_gib=self.cache_gib)

    @cached_property
    def _features(self) -> dict[str, FieldSpec]:
        manifest = self._found[1]
        if self.features is not None:
            return {name: _feature(name, kind) for name, kind in dict(self.features).items()}
        if manifest is not None:
            return {name: _feature(name, kind) for name, kind in manifest.features.items()}
        return self._seen_features()

    @property
    def fields_are_declared(self) -> bool:
        """Whether a manifest or the config says which features there are."""
        return self.features is not None or self._found[1] is not None

    def look_for(self, name: str) -> str:
        if name in self._features or self.fields_are_declared:
            return ""
        shards = self.shards
        count = len(self) if shards.in_place else shards.pieces[0].count
        indices = np.arange(0, count, -(-count // _FURTHER))
        found = self._features_of(indices)
        if name in found:
            self._features[name] = found[name]
            return ""
        looked_at = f"the {len(indices):,} records that were looked at"
        unknown = unknown_key_message(name, {**self._features, **found}, looked_at)
        return f"{unknown}, or name all by data.features"

    def _seen_features(self) -> dict[str, FieldSpec]:
        """The features of the first examples; `look_for` adds features of other examples."""
        count = min(_LOOKED_AT, len(self))
        found = self._features_of(np.arange(count))
        if not found:
            raise UserError(
                f"data.path={self.path!r}: none of the first {count} records can be read as a "
                "tf.train.Example; name their features by data.features"
            )
        return found

    def _features_of(self, indices: np.ndarray) -> dict[str, FieldSpec]:
        """The features of some examples; one that ever has several values is a list."""
        records, bad = self.files.read(indices)
        found: dict[str, FieldSpec] = {}
        # A list that happens to hold a single value in one example is a list in others.
        for record in records[bad == b""]:
            try:
                example = tf.train.Example.FromString(record)
            except Exception as error:  # protobuf's DecodeError is not public
                raise UserError(
                    f"{self.describe(0)} and others hold no tf.train.Example: {error}"
                ) from None
            for name, feature in sorted(example.features.feature.items()):
                spec = _spec_of(feature)
                if spec is not None and (name not in found or spec.shape):
                    found[name] = spec
        return found

    def fields(self) -> dict[str, FieldSpec]:
        return self._features

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        specs = {}
        for name in names:
            spec = self._features[name]
            dtype = tf.as_dtype(spec.dtype)
            one = tf.io.FixedLenFeature([], dtype)
            several = tf.io.FixedLenSequenceFeature([], dtype, allow_missing=True)
            specs[name] = several if spec.shape else one
        return dict(tf.io.parse_single_example(record["record"], specs)) if specs else {}

    def column(self, name: str) -> np.ndarray:
        values = np.ma.masked_all(len(self), self._features[name].dtype)
        for first in range(0, len(self), _COLUMN_CHUNK):
            indices = np.arange(first, min(first + _COLUMN_CHUNK, len(self)))
            records, bad = self.files.read(indices)
            for index, record in zip(indices[bad == b""], records[bad == b""], strict=True):
                feature = tf.train.Example.FromString(record).features.feature[name]
                found = getattr(feature, feature.WhichOneof("kind") or "int64_list").value
                if len(found) == 1:
                    values[index] = found[0]
        return values

    def class_names(self, field: str) -> tuple[str, ...] | None:
        manifest = self._found[1]
        return None if manifest is None else manifest.class_names.get(field)

    def blocks(self) -> Blocks | None:
        return Blocks(self.shards.block_sizes(BLOCK), WINDOW)


@dataclass(frozen=True)
class ArrayRecordSource(TFRecordSource):
    """tf.train.Example records in ArrayRecord files; see `TFRecordSource`."""

    kind: ClassVar[str] = "array_record"
    suffix: ClassVar[tuple[str, ...]] = (".array_record",)
    reader: ClassVar[type] = ArrayRecordFiles

    def blocks(self) -> Blocks | None:
        """Files that are copied first are blocks; None if all are local, for random access."""
        return None if self.shards.in_place else super().blocks()


def _feature(name: str, kind: str) -> FieldSpec:
    base = kind.removesuffix("[]") if isinstance(kind, str) else kind
    if base not in DTYPES:
        known = ", ".join(DTYPES)
        raise UserError(f"data.features.{name}={kind!r} must be one of {known}, or that with []")
    return FieldSpec((None,) if kind.endswith("[]") else (), DTYPES[base])


def _spec_of(feature: Any) -> FieldSpec | None:
    """The type of a tf.train.Feature; None if it is empty."""
    kind = feature.WhichOneof("kind")
    if kind is None:
        return None
    values = getattr(feature, kind).value
    if not values:
        return None
    dtype = DTYPES[{"bytes_list": "bytes", "int64_list": "int64", "float_list": "float32"}[kind]]
    return FieldSpec(() if len(values) == 1 else (None,), dtype)

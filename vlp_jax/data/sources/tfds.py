"""Datasets that tensorflow_datasets has prepared on disk, and the embedded `shapes`."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vlp_jax.data.lazy_tensorflow import import_tensorflow, tf
from vlp_jax.data.sources.base import Blocks, FieldSpec
from vlp_jax.data.sources.records import ArrayRecordFiles, RecordFiles, RecordSource, TFRecordFiles
from vlp_jax.data.sources.shards import Piece
from vlp_jax.errors import UserError

_COLUMN_CHUNK = 1024
BLOCK, WINDOW = 256, 4  # records of one file that are read together, such blocks at a time


@dataclass(frozen=True)
class TfdsSource(RecordSource):
    """A split of a dataset that tensorflow_datasets has prepared as ArrayRecord or TFRecord files.

    The fields are the dataset's features; nested ones are named by path ("objects/bbox"). Images
    and videos stay encoded. Features that are ragged in more than one dimension are left out.

    Attributes:
      dataset: "name", "name/config" or "name/config:version". "shapes", the embedded dataset, is
        prepared on first use; any other must have been prepared, and nothing is downloaded.
      split: a split's name, with the slicing of tensorflow_datasets ("train[:10%]", "a+b").
      data_dir: where prepared datasets lie; None is the default of tensorflow_datasets
        (~/tensorflow_datasets, or the environment variable TFDS_DATA_DIR).

    Raises:
      UserError: for a dataset or split that does not exist, or files of another format.
    """

    dataset: str
    split: str = "train"
    data_dir: str | None = None

    def __post_init__(self) -> None:
        _ = self.files

    @cached_property
    def _builder(self) -> Any:
        import_tensorflow()
        return find_builder(self.dataset, self.data_dir)

    @cached_property
    def files(self) -> RecordFiles:
        info = split_info(self._builder, self.dataset, self.split)
        pieces = [Piece(str(f.filename), f.skip, f.take) for f in info.file_instructions]
        random_access = file_format(self._builder) == ARRAY_RECORD
        return (ArrayRecordFiles if random_access else TFRecordFiles)(pieces)

    def fields(self) -> dict[str, FieldSpec]:
        return self._fields

    @cached_property
    def _fields(self) -> dict[str, FieldSpec]:
        fields: dict[str, FieldSpec] = {}

        # Tracing is the one way to learn shapes and dtypes as `deserialize_example` gives them.
        def trace(record: tf.Tensor) -> None:
            example = self._deserialize(record, list(self._builder.info.features))
            for name, value in example.items():
                if isinstance(value, tf.Tensor):
                    dtype = np.dtype(value.dtype.as_numpy_dtype)
                    fields[name] = FieldSpec(tuple(value.shape), dtype)

        record = tf.TensorSpec([], tf.string)
        tf.function(trace, autograph=False).get_concrete_function(record)
        return fields

    def parse(self, record: dict[str, tf.Tensor], names: Sequence[str]) -> dict[str, tf.Tensor]:
        # tensorflow_datasets reads whole features; parts of them are named by path here.
        top_level = list(dict.fromkeys(name.split("/")[0] for name in names))
        example = self._deserialize(record["record"], top_level)
        return {name: example[name] for name in names}

    def _deserialize(self, record: tf.Tensor, names: Sequence[str]) -> dict[str, Any]:
        """The top-level features `names` of a serialized example, flat, images still encoded."""
        import tensorflow_datasets as tfds

        subset = {name: self._builder.info.features[name] for name in names}
        skips = {name: _skip_images(feature) for name, feature in subset.items()}
        decoders = {name: decoder for name, decoder in skips.items() if decoder is not None}
        features = tfds.features.FeaturesDict(subset)
        return dict(_flat(features.deserialize_example(record, decoders=decoders)))

    def column(self, name: str) -> np.ndarray:
        def read(start: tf.Tensor) -> tf.Tensor:
            def chunk(first: np.int64) -> np.ndarray:
                last = min(first + _COLUMN_CHUNK, len(self))
                return self.files.read(np.arange(first, last))[0]

            records = tf.numpy_function(chunk, [start], tf.string, stateful=False)
            records.set_shape([None])
            return records

        def parse(record: tf.Tensor) -> tf.Tensor:
            return self.parse({"record": record}, [name])[name]

        as_written = tf.autograph.experimental.do_not_convert
        starts = tf.data.Dataset.range(0, len(self), _COLUMN_CHUNK)
        records = starts.map(as_written(read)).unbatch()
        values = records.map(as_written(parse), num_parallel_calls=tf.data.AUTOTUNE)
        return np.concatenate(list(values.batch(_COLUMN_CHUNK).as_numpy_iterator()))

    def class_names(self, field: str) -> tuple[str, ...] | None:
        import tensorflow_datasets as tfds

        feature = self._builder.info.features
        for part in field.split("/"):
            if isinstance(feature, tfds.features.Sequence):
                feature = feature.feature
            if not isinstance(feature, tfds.features.FeaturesDict) or part not in feature:
                return None
            feature = feature[part]
        if isinstance(feature, tfds.features.Sequence):
            feature = feature.feature
        return tuple(feature.names) if isinstance(feature, tfds.features.ClassLabel) else None

    def describe(self, index: int) -> str:
        piece, record = self.shards.locate(np.array([index]))
        file = Path(self.shards.pieces[piece[0]].path).name
        return f"{self._builder.info.full_name} {self.split}, record {record[0]} of {file}"

    def blocks(self) -> Blocks | None:
        """The blocks of TFRecord files; None for ArrayRecord, which finds any record at once."""
        shards = self.shards
        if shards.in_place and isinstance(self.files, ArrayRecordFiles):
            return None
        return Blocks(shards.block_sizes(BLOCK), WINDOW if shards.in_place else 1)


def _skip_images(feature: Any) -> Any:
    """The decoders that leave the images below `feature` encoded; None if there are none."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Image | tfds.features.Video):
        return tfds.decode.SkipDecoding()
    if isinstance(feature, tfds.features.Sequence):
        return _skip_images(feature.feature)
    if isinstance(feature, tfds.features.FeaturesDict):
        inner = {name: _skip_images(value) for name, value in feature.items()}
        return {name: value for name, value in inner.items() if value is not None} or None
    return None


def _flat(example: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in example.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}/")
        else:
            yield prefix + name, value


EMBEDDED = "shapes"
ARRAY_RECORD = "array_record"
FORMATS = (ARRAY_RECORD, "tfrecord")  # the formats that are read here, the best first


def find_builder(dataset: str, data_dir: str | None) -> Any:
    """The tensorflow_datasets builder of a prepared dataset, as `TfdsSource` describes it.

    Only files are consulted (never a bucket or a community index), so that a wrong name fails at
    once on a machine without a network.
    """
    import tensorflow_datasets as tfds

    root = data_dir or str(tfds.core.constants.DATA_DIR)
    if "://" not in root:
        root = str(Path(root).expanduser())
    name, _, config = dataset.partition("/")
    if name == EMBEDDED:
        from vlp_jax.data.shapes.builder import prepare

        return prepare(config or "default", root)
    try:
        builder = tfds.core.read_only_builder.builder_from_files(dataset, data_dir=root)
    except tfds.core.DatasetNotFoundError:
        raise UserError(_not_found(dataset, root)) from None
    except ValueError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"data.dataset={dataset!r} is not a dataset name: {reason}") from None
    formats = [_value(builder.info.file_format)]
    formats += [_value(each) for each in builder.info.alternative_file_formats]
    readable = [name for name in FORMATS if name in formats]
    if not readable:
        raise UserError(
            f"dataset {dataset!r} in {root} has {formats[0]} files, which are not read here; "
            f"prepare it as ArrayRecord in another folder and set data.data_dir to it: "
            f"{_command(dataset, '<new folder>')}"
        )
    # The builder reads the format it was prepared in first, which may be the slower one.
    if formats[0] != readable[0]:
        builder = tfds.core.read_only_builder.builder_from_files(
            dataset, data_dir=root, file_format=readable[0]
        )
    return builder


def file_format(builder: Any) -> str:
    """The format of a builder's files, one of `FORMATS`."""
    return _value(builder.info.file_format)


def _value(each: Any) -> str:
    return getattr(each, "value", each)


def split_info(builder: Any, dataset: str, split: str) -> Any:
    """The tensorflow_datasets split info of `split`, a name or a slice that is not empty."""
    splits = builder.info.splits
    listing = ", ".join(f"{name} ({info.num_examples})" for name, info in splits.items())
    try:
        info = splits[split]
        sizes = [instruction.take for instruction in info.file_instructions]
    except (KeyError, ValueError):
        raise UserError(
            f"data.split={split!r} is not a split of {dataset}{_nearest(split, splits)} "
            f"(splits: {listing}; slices look like train[:10%])"
        ) from None
    if not sizes or min(sizes) < 0 or sum(sizes) < 1:
        raise UserError(f"data.split={split!r} of {dataset} holds no examples (splits: {listing})")
    return info


def _not_found(dataset: str, root: str) -> str:
    import tensorflow_datasets as tfds

    name = dataset.partition("/")[0].partition(":")[0]
    there = _folders(Path(root) / name)
    if there:
        return (
            f"dataset {dataset!r} is not in {root}; of {name!r} there is: {', '.join(there)}; "
            f"set data.dataset to name/config:version"
        )
    known = tfds.list_builders(with_community_datasets=False)
    if name in known:
        return (
            f"dataset {dataset!r} is not prepared in {root}; prepare it with: "
            f"{_command(dataset, root)}"
        )
    hint = _nearest(name, [*known, *_folders(Path(root)), EMBEDDED])
    return (
        f"no dataset is named {name!r}{hint} (looked in {root} and among the names of "
        f"tensorflow_datasets; the embedded one is {EMBEDDED!r})"
    )


def _folders(path: Path) -> list[str]:
    if not path.is_dir():
        return []
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir())


def _nearest(name: str, known: Any) -> str:
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""


def _command(dataset: str, data_dir: str) -> str:
    return (
        'python -c "import tensorflow_datasets as tfds; '
        f"tfds.builder('{dataset}', data_dir='{data_dir}', file_format='{ARRAY_RECORD}')"
        '.download_and_prepare()"'
    )

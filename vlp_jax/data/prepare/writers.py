"""One shard of each output format, written example by example to a local file."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.prepare.examples import CAPTIONS, ID, IMAGE, Reference, Value, image_type

FieldTypes = Mapping[str, Mapping[str, Any]]


class Writer(Protocol):
    """A shard that is being written. It is whole once `close` returned."""

    def write(self, reference: Reference, image: bytes) -> None: ...

    def close(self) -> None: ...


class RecordWriter:
    """Serialized examples, by a writer of the format's own library."""

    def __init__(self, writer: Any, types: FieldTypes):
        self._writer, self._types = writer, types

    def write(self, reference: Reference, image: bytes) -> None:
        self._writer.write(serialize(reference, image, self._types))

    def close(self) -> None:
        self._writer.close()


def array_record_writer(path: str, types: FieldTypes) -> RecordWriter:
    """Opens an ArrayRecord file (github.com/google/array_record); records are read singly."""
    from array_record.python.array_record_module import ArrayRecordWriter

    return RecordWriter(ArrayRecordWriter(path, "group_size:1"), types)


def tfrecord_writer(path: str, types: FieldTypes) -> RecordWriter:
    """Opens an uncompressed TFRecord file (tensorflow.org/tutorials/load_data/tfrecord)."""
    return RecordWriter(tf.io.TFRecordWriter(path), types)


class WebDatasetWriter:
    """A tar of KEY.jpg (or what the image is), KEY.txt (first caption) and KEY.json (the rest).

    KEY is the example's id with "%" and the dots of its last part percent-encoded, because readers
    take the key to end at the first dot. Times and owners are zero, so that shards are repeatable.
    """

    def __init__(self, path: str, types: FieldTypes):
        self._tar = tarfile.open(path, "w", format=tarfile.PAX_FORMAT)
        self._types = types

    def write(self, reference: Reference, image: bytes) -> None:
        key = tar_key(reference.id)
        rest = {ID: reference.id, CAPTIONS: reference.captions}
        for name, value in reference.fields.items():
            rest[name] = _as_listed(value, self._types[name])
        self._add(f"{key}.{image_type(image)}", image)
        self._add(f"{key}.txt", reference.captions[0].encode())
        self._add(f"{key}.json", json.dumps(rest, ensure_ascii=False).encode())

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self._tar.addfile(info, io.BytesIO(data))

    def close(self) -> None:
        self._tar.close()


# The formats, each with the ending of its files.
WRITERS: dict[str, tuple[str, Callable[[str, FieldTypes], Writer]]] = {
    "array_record": ("array_record", array_record_writer),
    "tfrecord": ("tfrecord", tfrecord_writer),
    "webdataset": ("tar", WebDatasetWriter),
}


def tar_key(id: str) -> str:
    """The key of an id in a tar: see `WebDatasetWriter`. `urllib.parse.unquote` is the inverse."""
    folder, slash, name = id.replace("%", "%25").rpartition("/")
    return folder + slash + name.replace(".", "%2E")


def serialize(reference: Reference, image: bytes, types: FieldTypes) -> bytes:
    """A tf.train.Example with the features `id`, `image`, `captions` and the further fields."""
    values: dict[str, Value] = {
        ID: reference.id,
        IMAGE: image,
        CAPTIONS: list(reference.captions),
        **reference.fields,
    }
    example = tf.train.Example()
    for name, value in values.items():
        items = value if isinstance(value, list) else [value]
        feature = example.features.feature[name]
        if types[name]["dtype"] == "int64":
            feature.int64_list.value.extend(items)
        elif types[name]["dtype"] == "float32":
            feature.float_list.value.extend(items)
        else:
            feature.bytes_list.value.extend(
                item if isinstance(item, bytes) else item.encode() for item in items
            )
    # Features are a map. Only `deterministic` fixes the order in which it is written.
    return example.SerializeToString(deterministic=True)


def _as_listed(value: Value, kind: Mapping[str, Any]) -> Value:
    items = value if isinstance(value, list) else [value]
    if kind["dtype"] == "float32":
        # JSON would write 3 for a float of some examples, and readers take the type from there.
        items = [float(item) for item in items]
    return items if kind["list"] else items[0]

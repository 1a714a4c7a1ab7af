"""The second pass: writes each shard, in its output format, from its run of the order."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlp_jax.data.lazy_tensorflow import tf
from vlp_jax.data.prepare import paths, plan
from vlp_jax.data.prepare.examples import CAPTIONS, ID, IMAGE, Reference, Value, image_type

FieldTypes = Mapping[str, Mapping[str, Any]]


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
WRITERS: dict[str, tuple[str, Callable[[str, FieldTypes], RecordWriter | WebDatasetWriter]]] = {
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


# Images that are read at once: where the filesystem allows, as so many requests at a time.
_BATCH_EXAMPLES, _BATCH_BYTES = 64, 32 * 2**20
_RECORDS = "shards"


@dataclass(frozen=True)
class Shards:
    """The settings that the workers of the second pass get.

    Attributes:
      types: the manifest's `fields`.
      buckets: bucket -> examples, of the first pass, whose folder is `work`.
      verify: whether a finished shard is read and its checksum compared, or only its size.
    """

    output: str
    split: str
    format: str
    number: int
    types: FieldTypes
    buckets: dict[str, int]
    work: str
    verify: bool

    def name(self, index: int) -> str:
        return f"{self.split}-{index:05d}-of-{self.number:05d}.{WRITERS[self.format][0]}"

    def bounds(self, index: int) -> tuple[int, int]:
        """The run [start, stop) of the global order; runs differ by one example at most."""
        total = sum(self.buckets.values())
        return index * total // self.number, (index + 1) * total // self.number


def write(shards: Shards, indices: Sequence[int], flags: Sequence[str]) -> None:
    """Writes the shards of `indices` that are not there yet."""

    def build(pipeline: Any) -> None:
        beam = plan.import_beam()
        _ = (
            pipeline
            | "Shards" >> beam.Create(list(indices))
            | "Spread" >> beam.Reshuffle()
            | "Write" >> beam.Map(write_shard, shards)
        )

    plan.run(build, flags)


def write_shard(index: int, shards: Shards) -> None:
    """Writes a shard under its name and its record beside the plan, unless it is there already.

    The record comes first: a shard under its final name always has one, and a record counts only if
    the shard is there and as long as it says.
    """
    name = shards.name(index)
    lines = plan.slice_lines(shards.work, shards.buckets, *shards.bounds(index))
    fingerprint = _fingerprint(lines, shards)
    record = load_record(shards.work, name)
    done = record is not None and record["fingerprint"] == fingerprint
    if done and fault_of(record, shards.output, shards.verify) is None:
        return
    path = paths.join(shards.output, name)
    with paths.whole_file(path) as stream:
        writer = WRITERS[shards.format][1](stream.name, shards.types)
        for batch in _batches([Reference.loads(line) for line in lines]):
            images = paths.read_ranges([(r.path, r.offset, r.size) for r in batch])
            for reference, image in zip(batch, images, strict=True):
                writer.write(reference, image)
        writer.close()
        record = {
            "file": name,
            "examples": len(lines),
            "bytes": os.path.getsize(stream.name),
            "sha256": sha256(stream.name),
            "fingerprint": fingerprint,
        }
        # The record before the shard, which gets its name at the end of this block: see above.
        paths.write_bytes(_record_path(shards.work, name), json.dumps(record).encode())


def _fingerprint(lines: Sequence[str], shards: Shards) -> str:
    """SHA-256 of everything that a shard depends on; images count by their place and size."""
    digest = hashlib.sha256(json.dumps([shards.format, shards.types], sort_keys=True).encode())
    for line in lines:
        digest.update(f"{line}\n".encode())
    return digest.hexdigest()


def _batches(references: Sequence[Reference]) -> Iterator[list[Reference]]:
    batch: list[Reference] = []
    size = 0
    for reference in references:
        full = len(batch) == _BATCH_EXAMPLES or size + reference.size > _BATCH_BYTES
        # A request for many ranges goes to one filesystem.
        if batch and (full or _filesystem_of(reference) != _filesystem_of(batch[0])):
            yield batch
            batch, size = [], 0
        batch.append(reference)
        size += reference.size
    if batch:
        yield batch


def _filesystem_of(reference: Reference) -> str:
    return "" if paths.is_local(reference.path) else reference.path.partition("://")[0]


def _record_path(work: str, name: str) -> str:
    return paths.join(work, _RECORDS, f"{name}.json")


def load_record(work: str, name: str) -> dict[str, Any] | None:
    """The record of a shard: file, examples, bytes, sha256, fingerprint; None if there is none."""
    try:
        return json.loads(paths.read_bytes(_record_path(work, name)))
    except FileNotFoundError:
        return None


def records(work: str) -> list[str]:
    """The names of the shards that have a record."""
    names = paths.names_in(paths.join(work, _RECORDS))
    return [name.removesuffix(".json") for name in names if not name.startswith(".")]


def fault_of(record: dict[str, Any], folder: str, read: bool) -> str | None:
    """Describes what is wrong with a finished shard; None if nothing is.

    If `read`, the shard is read and its checksum compared; else only its size.
    """
    path = paths.join(folder, record["file"])
    size = paths.size_of(path)
    if size is None:
        return f"{path} is not there"
    if size != record["bytes"]:
        return f"{path} has {size} bytes, not {record['bytes']}"
    if read and sha256(path) != record["sha256"]:
        return f"{path} has another checksum than when it was written"
    return None


def sha256(path: str) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    fs, inner = paths.filesystem(path)
    digest = hashlib.sha256()
    with fs.open(inner, "rb") as stream:
        for block in iter(lambda: stream.read(2**20), b""):
            digest.update(block)
    return digest.hexdigest()


def foreign_files(output: str, split: str, known: Sequence[str]) -> list[str]:
    """Files in a folder that are named as shards of a split, and are not among the `known`."""
    endings = tuple(f".{suffix}" for suffix, _ in WRITERS.values())
    names = [name for name in paths.names_in(output) if name.endswith(endings)]
    ours = [name for name in names if name.startswith(f"{split}-") and "-of-" in name]
    return sorted(set(ours).difference(known))

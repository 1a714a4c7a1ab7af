"""One small corpus in every format that is read, written by the formats' own libraries."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

SIZE = 16
OPS = {"decode_image": {}, "resize": {"size": SIZE}}


def jpeg(number, size=(24, 20)):
    """A photograph of noise that is number's own."""
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize(size).save(stream, "jpeg", quality=90)
    return stream.getvalue()


def examples(count, first=0):
    """Dicts of id, image (encoded), text and label."""
    return [
        {"id": f"id{n:06d}", "image": jpeg(n), "text": f"Number {n}", "label": n % 3}
        for n in range(first, first + count)
    ]


def split(rows, shards):
    """Consecutive runs of different lengths."""
    ends = np.linspace(0, len(rows) ** 0.9, shards + 1) ** (1 / 0.9)
    ends = [0, *np.maximum(1, ends[1:-1]).astype(int), len(rows)]
    return [rows[a:b] for a, b in zip(ends[:-1], ends[1:], strict=True)]


def write_tars(folder, shards, suffix="tar"):
    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        with tarfile.open(
            folder / f"{number:05d}.{suffix}", "w:gz" if "gz" in suffix else "w"
        ) as tar:
            for row in rows:
                note = {"caption": row["text"], "width": 24, "label": row["label"]}
                files = {"jpg": row["image"], "json": json.dumps(note).encode()}
                if row["text"] is not None:
                    files["txt"] = row["text"].encode()
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{row['id']}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return {
        "source": "webdataset",
        "path": str(folder),
        "fields": {**FIELDS, "label": "json.label"},
    }


FIELDS = {"id": "id", "image": "image", "text": "text", "label": "label"}


def tf_example(row):
    import tensorflow as tf

    def feature(value):
        if isinstance(value, int):
            return tf.train.Feature(int64_list=tf.train.Int64List(value=[value]))
        value = value.encode() if isinstance(value, str) else value
        return tf.train.Feature(bytes_list=tf.train.BytesList(value=[value]))

    names = {"id": "key", "image": "jpg", "text": "caption", "label": "label"}
    features = {names[k]: feature(v) for k, v in row.items() if v is not None}
    return tf.train.Example(features=tf.train.Features(feature=features)).SerializeToString()


def write_tfrecords(folder, shards, compression=None):
    import tensorflow as tf

    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        end = ".gz" if compression else ""
        name = str(folder / f"{number:05d}.tfrecord{end}")
        with tf.io.TFRecordWriter(name, compression or "") as writer:
            for row in rows:
                writer.write(tf_example(row))
    return {"source": "tfrecord", "path": f"{folder}/*.tfrecord*"}


def write_array_records(folder, shards):
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        writer = ArrayRecordWriter(str(folder / f"{number:05d}.array_record"), "group_size:1")
        for row in rows:
            writer.write(tf_example(row))
        writer.close()
    return {"source": "array_record", "path": str(folder)}


def write_parquet(folder, shards, row_group_size=7):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    kind = pa.schema(
        {
            "id": pa.string(),
            "image": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
            "text": pa.string(),
            "label": pa.int64(),
        }
    )
    for number, rows in enumerate(shards):
        table = [{**r, "image": {"bytes": r["image"], "path": None}} for r in rows]
        pq.write_table(
            pa.Table.from_pylist(table, kind),
            folder / f"{number:05d}.parquet",
            row_group_size=row_group_size,
        )
    return {"source": "parquet", "path": f"{folder}/{{00000..{len(shards) - 1:05d}}}.parquet"}


def write_folder(folder, shards):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for row in (row for rows in shards for row in rows):
        (folder / f"{row['id']}.jpg").write_bytes(row["image"])
        lines.append(
            json.dumps(
                {"path": f"{row['id']}.jpg", "caption": row["text"], "label": str(row["label"])}
            )
        )
    (folder / "captions.jsonl").write_text("\n".join(lines))
    return {
        "source": "folder",
        "path": str(folder),
        "split": "all",
        "label_field": "label",
        "fields": {"id": "path", "image": "image", "captions": "captions", "label": "label"},
        "preprocess": {"choose_text": {}, **OPS},
    }


def write_arrays(folder, shards):
    rows = [row for part in shards for row in part]
    return {"source": "arrays", "arrays": {name: [r[name] for r in rows] for name in FIELDS}}


def write_tfds(folder, shards, file_format="tfrecord"):
    import tensorflow_datasets as tfds

    rows = [row for part in shards for row in part]
    features = tfds.features.FeaturesDict(
        {
            "id": tfds.features.Text(),
            "image": tfds.features.Image(encoding_format="jpeg"),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(num_classes=3),
        }
    )
    tfds.dataset_builders.store_as_tfds_dataset(
        name="toy",
        version="1.0.0",
        features=features,
        split_datasets={
            "train": [(n, {**r, "image": io.BytesIO(r["image"])}) for n, r in enumerate(rows)]
        },
        data_dir=str(folder),
        file_format=file_format,
        disable_shuffling=True,
    )
    return {"source": "tfds", "dataset": "toy", "split": "train", "data_dir": str(folder)}


def write_tfds_array_record(folder, shards):
    return write_tfds(folder, shards, "array_record")


def write_gzipped_tars(folder, shards):
    return {**write_tars(folder, shards, "tar.gz"), "path": f"{folder}/*.tar.gz"}


def write_gzipped_tfrecords(folder, shards):
    return write_tfrecords(folder, shards, "GZIP")


WRITERS = {
    "array_record": write_array_records,
    "arrays": write_arrays,
    "folder": write_folder,
    "parquet": write_parquet,
    "tfds_array_record": write_tfds_array_record,
    "tfds_tfrecord": write_tfds,
    "tfrecord": write_tfrecords,
    "tfrecord_gz": write_gzipped_tfrecords,
    "webdataset": write_tars,
    "webdataset_gz": write_gzipped_tars,
}


def config(kind, folder, rows, shards=5, **keys):
    """The data config of a corpus in a format, which is written into `folder`."""
    made = WRITERS[kind](folder / kind, split(rows, shards))
    if made["source"] in ("webdataset", "tfrecord", "array_record", "parquet"):
        made["cache_dir"] = str(folder / "cache")
    return {"preprocess": OPS, **made, **keys}

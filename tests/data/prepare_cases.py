"""Small inputs for tools.prepare_data, and what reads its shards."""

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from vlp_jax.data.prepare import job as jobs  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
TYPES = ("jpg", "png", "webp", "gif", "bmp")
COUNT = 23
INPUTS, OUTPUTS = ("folder", "webdataset", "parquet"), ("array_record", "tfrecord", "webdataset")


def encode(kind, number, size=12):
    pixels = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return stream.getvalue()


def examples(count=COUNT):
    """(name, kind, image, captions, label) of a small data set with all image types."""
    for i in range(count):
        kind = TYPES[i % len(TYPES)]
        captions = [f"näme {i}", f"another {i}"] if i % 3 == 0 else [f"näme {i}"]
        yield f"n{i:03d}", kind, encode(kind, i), captions, i % 4


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def write_folder(root, order=None):
    (root / "a.b").mkdir(parents=True)
    rows = []
    for name, kind, image, captions, label in examples():
        (root / "a.b" / f"{name}.{kind}").write_bytes(image)
        rows += [(f"a.b/{name}.{kind}", caption, f"class {label}") for caption in captions]
    (order or (lambda rows: None))(rows)
    with (root / "captions.csv").open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream).writerows([("path", "caption", "class"), *rows])
    return str(root), {"label": "class"}, {f"a.b/{n}.{k}": n for n, k, *_ in examples()}


def write_tars(root):
    root.mkdir()
    ids = {}
    for part in range(3):
        with tarfile.open(root / f"{part:05d}.tar", "w") as tar:
            for name, kind, image, captions, label in list(examples())[part::3]:
                add(tar, f"{name}.{kind}", image)
                add(tar, f"{name}.json", json.dumps({"texts": captions, "label": label}).encode())
                add(tar, f"{name}.cls", str(label).encode())
                ids[f"{part:05d}/{name}"] = name
    return f"{root}/{{00000..00002}}.tar", {"captions": "json.texts", "label": "cls"}, ids


def write_parquet(root):
    root.mkdir()
    ids = {}
    for part in range(2):
        rows = list(examples())[part::2]
        table = {
            "image": [{"bytes": image, "path": f"{name}.{kind}"} for name, kind, image, *_ in rows],
            "texts": [captions for *_, captions, _ in rows],
            "label": [label for *_, label in rows],
        }
        pq.write_table(pa.table(table), root / f"{part}.parquet", row_group_size=4)
        ids |= {f"{part}#{row}": name for row, (name, *_) in enumerate(rows)}
    return f"{root}/*.parquet", {"captions": "texts", "label": "label"}, ids


WRITE = {"folder": write_folder, "webdataset": write_tars, "parquet": write_parquet}


def make_job(input, input_format, output, output_format="array_record", **more):
    if "examples_per_shard" not in more:
        more.setdefault("shards", 4)
    inputs = (input,) if isinstance(input, str) else tuple(input)
    return jobs.PrepareJob(inputs, input_format, str(output), output_format, **more)


def parsed(serialized):
    import tensorflow as tf

    found = {}
    for name, feature in tf.train.Example.FromString(serialized).features.feature.items():
        found[name] = list(getattr(feature, feature.WhichOneof("kind")).value)
    return {
        "id": found.pop("id")[0].decode(),
        "image": found.pop("image")[0],
        "captions": [caption.decode() for caption in found.pop("captions")],
        **found,
    }


def read_shard(path):
    """The examples of a shard in order, by the reader of its format."""
    if path.suffix == ".array_record":
        from array_record.python.array_record_module import ArrayRecordReader

        reader = ArrayRecordReader(str(path))
        assert "group_size:1," in reader.writer_options_string() + ","
        return [parsed(record) for record in reader.read_all()]
    if path.suffix == ".tfrecord":
        import tensorflow as tf

        return [parsed(r) for r in tf.data.TFRecordDataset(str(path)).as_numpy_iterator()]
    import webdataset

    found = []
    for sample in webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False):
        data = json.loads(sample["json"])
        assert sample["txt"].decode() == data["captions"][0]
        assert unquote(sample["__key__"]) == data["id"]
        (kind,) = set(sample) & set(TYPES)
        assert Image.open(io.BytesIO(sample[kind])).format == {"jpg": "JPEG"}.get(
            kind, kind.upper()
        )
        label = {"label": [data["label"]]} if "label" in data else {}
        found.append({**data, "image": sample[kind], **label})
    return found


def read(output, manifest):
    """All examples in order; checks that every shard is what the manifest says."""
    found = []
    for shard in manifest["shards"]:
        path = Path(output) / shard["file"]
        data = path.read_bytes()
        assert shard["sha256"] == hashlib.sha256(data).hexdigest()
        assert shard["bytes"] == len(data)
        part = read_shard(path)
        assert len(part) == shard["examples"]
        found += part
    assert len(found) == manifest["examples"]
    return found


def contents(output):
    return {p.name: p.read_bytes() for p in Path(output).glob("*-of-*")}

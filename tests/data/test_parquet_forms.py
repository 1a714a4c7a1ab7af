"""Forms of Parquet files that others write, against pyarrow."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vlp_jax.data.faults import FAULT
from vlp_jax.data.sources import build_source
from vlp_jax.errors import UserError

COUNT = 12
TEXTS = [f"caption {n} \u00e9" for n in range(COUNT)]
IMAGES = [b"image %d" % n for n in range(COUNT)]
HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def table(**columns):
    return pa.table({"image": IMAGES, "text": TEXTS, **columns})


def config(path, cache, **keys):
    return {"source": "parquet", "path": str(path), "cache_dir": str(cache / "cache"), **keys}


def refused(data, message):
    with pytest.raises(UserError, match=message) as error:
        build_source(data)
    assert "\n" not in str(error.value)
    return str(error.value)


FORMS = {
    "plain": (table(), {}),
    "several row groups": (table(), {"row_group_size": 5}),
    "dictionary": (table(text=pa.array(TEXTS).dictionary_encode()), {}),
    "large strings": (
        table(text=pa.array(TEXTS, pa.large_string()), image=pa.array(IMAGES, pa.large_binary())),
        {},
    ),
    "views": (
        table(text=pa.array(TEXTS, pa.string_view()), image=pa.array(IMAGES, pa.binary_view())),
        {},
    ),
    "fixed sizes": (table(image=pa.array([i.ljust(9) for i in IMAGES], pa.binary(9))), {}),
    "pages of version 2": (table(), {"data_page_version": "2.0", "version": "2.6"}),
    "no dictionary, no statistics": (table(), {"use_dictionary": False, "write_statistics": False}),
    "binary text": (table(text=pa.array([t.encode() for t in TEXTS])), {}),
    "image of datasets": (
        table(image=pa.array([{"bytes": i, "path": "x"} for i in IMAGES], HF_IMAGE)),
        {},
    ),
    "columns that are not read": (
        table(
            price=[decimal.Decimal("1.5")] * COUNT,
            when=[datetime.datetime(2024, 1, 1)] * COUNT,
            nothing=pa.nulls(COUNT),
            map=pa.array([[("a", 1)]] * COUNT, pa.map_(pa.string(), pa.int64())),
            lists=[[[1]]] * COUNT,
        ),
        {},
    ),
    **{
        c: (table(), {"compression": c})
        for c in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_are_read_as_pyarrow_reads_them(tmp_path, form):
    written, settings = FORMS[form]
    pq.write_table(written, tmp_path / "x.parquet", **settings)
    source = build_source(config(tmp_path / "x.parquet", tmp_path))
    assert set(source.fields()) == {"image", "text"}
    record = source.fetch(np.arange(COUNT)[::-1])
    expected = pq.read_table(tmp_path / "x.parquet").to_pylist()[::-1]
    for ours, row in zip(record["image"], expected, strict=True):
        assert ours == (row["image"]["bytes"] if isinstance(row["image"], dict) else row["image"])
    texts = [t if isinstance(t, bytes) else t.encode() for t in (row["text"] for row in expected)]
    assert record["text"].tolist() == texts and record[FAULT].tolist() == [b""] * COUNT


NUMBERS = {
    "bool": ([True, False, None], pa.bool_()),
    "uint8": ([0, 255, None], pa.uint8()),
    "uint64, too large": ([1, 2, 2**63], pa.uint64()),
    "nullable int": ([1, -1, None], pa.int32()),
    "float16": ([0.5, -2.0, None], pa.float16()),
    "float64": ([0.25, 1e30, None], pa.float64()),
}


@pytest.mark.parametrize("form", NUMBERS)
def test_numbers(tmp_path, form):
    values, kind = NUMBERS[form]
    pq.write_table(pa.table({"label": pa.array(values, kind)}), tmp_path / "x.parquet")
    source = build_source(config(tmp_path / "x.parquet", tmp_path))
    record = source.fetch(np.arange(3))
    read = pq.read_table(tmp_path / "x.parquet")["label"].to_pylist()
    assert record["label"][:2].tolist() == np.array(read[:2], record["label"].dtype).tolist()
    assert [b"missing field" in fault for fault in record[FAULT]] == [False, False, True]


META = pa.array([{"caption": t, "tags": ["a", t], "in": {"n": n}} for n, t in enumerate(TEXTS)])
LISTS = {
    "list": pa.list_(pa.string()),
    "large list": pa.large_list(pa.large_string()),
    "list view": pa.list_view(pa.string()),
    "fixed size list": pa.list_(pa.string(), 2),
    "list of bytes": pa.list_(pa.binary()),
}


@pytest.mark.parametrize("form", LISTS)
def test_lists_of_captions(tmp_path, form):
    captions = pa.array([["a", text] for text in TEXTS], LISTS[form])
    pq.write_table(table(captions=captions), tmp_path / "x.parquet")
    record = build_source(config(tmp_path / "x.parquet", tmp_path)).fetch(np.arange(COUNT))
    assert record["captions"].tolist() == [[b"a", text.encode()] for text in TEXTS]


def test_what_structs_hold_is_named_by_dots(tmp_path):
    flat = pa.array([f"flat {n}" for n in range(COUNT)])
    images = pa.array([{"bytes": i, "path": f"{n}.jpg"} for n, i in enumerate(IMAGES)], HF_IMAGE)
    inner = pa.StructArray.from_arrays([images], names=["image"])
    written = table(meta=META, image=images, deep=inner).append_column("meta.flat", flat)
    pq.write_table(written, tmp_path / "x.parquet")
    fields = {
        "image": "deep.image", "text": "meta.caption", "tags": "meta.tags", "n": "meta.in.n",
        "flat": "meta.flat", "path": "image.path",
    }  # fmt: skip
    data = config(tmp_path / "x.parquet", tmp_path)
    source = build_source({**data, "fields": fields})
    record = source.fetch(np.arange(COUNT))
    rows = pq.read_table(tmp_path / "x.parquet").to_pylist()
    assert record["deep.image"].tolist() == [row["deep"]["image"]["bytes"] for row in rows]
    assert record["meta.caption"].tolist() == [row["meta"]["caption"].encode() for row in rows]
    assert record["meta.tags"][3].tolist() == [b"a", TEXTS[3].encode()]
    assert record["meta.in.n"].tolist() == [row["meta"]["in"]["n"] for row in rows]
    assert record["meta.flat"].tolist() == [row["meta.flat"].encode() for row in rows]
    assert record["image.path"].tolist() == [row["image"]["path"].encode() for row in rows]
    assert len(build_source({**data, "fields": fields, "where": {"n": 3}})) == 1
    refused({**data, "fields": {"text": "meta.captoin"}}, "unknown key 'meta.captoin'")


UNREAD = {
    "captions": ([[{"raw": "a"}]] * COUNT, r"list<element: struct<raw: string>>"),
    "when": ([datetime.datetime(2024, 1, 1)] * COUNT, r"timestamp\[us\]"),
    "price": ([decimal.Decimal("1.5")] * COUNT, r"decimal128"),
    "nothing": (pa.nulls(COUNT), "holds no value"),
    "meta": (META, r"name a part of it \(meta.caption, meta.tags, meta.in\)"),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_column_of_a_type_that_is_not_read_is_named_with_its_type(tmp_path, name):
    values, said = UNREAD[name]
    pq.write_table(table(**{name: values}), tmp_path / "x.parquet")
    data = config(tmp_path / "x.parquet", tmp_path)
    refused({**data, "fields": {"text": name}}, f"data.fields.text='{name}'.*x.parquet.*{said}")
    assert build_source(data).fields()  # nobody asks for it


def test_two_columns_of_one_name(tmp_path):
    names = ["image", "text", "text", "label"]
    arrays = [pa.array(IMAGES), pa.array(TEXTS), pa.array(TEXTS), pa.array(range(COUNT))]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "x.parquet")
    data = config(tmp_path / "x.parquet", tmp_path)
    fields = {"image": "image", "text": "text"}
    refused({**data, "fields": fields}, "2 columns of .*x.parquet are named 'text': rename")
    source = build_source(data)  # nobody asks for them
    assert set(source.fields()) == {"image", "label"}
    assert source.fetch(np.arange(COUNT))["label"].tolist() == list(range(COUNT))
    # In a further file alone, its rows are bad examples.
    (tmp_path / "two").mkdir()
    pq.write_table(table(), tmp_path / "two" / "0.parquet")
    (tmp_path / "x.parquet").rename(tmp_path / "two" / "1.parquet")
    record = build_source({**data, "path": str(tmp_path / "two"), "fields": fields}).fetch(
        np.arange(2 * COUNT)
    )
    faulty = [b"two of that name" in fault for fault in record[FAULT]]
    assert faulty == [False] * COUNT + [True] * COUNT


def test_files_whose_columns_differ(tmp_path):
    others = [
        table(label=range(COUNT), late=["x"] * COUNT, empty=["y"] * COUNT),
        table().select(["text", "image"]),
        table().select(["image"]),
        table(image=pa.array([{"bytes": i, "path": "x"} for i in IMAGES], HF_IMAGE)),
        table().slice(0, 0),
    ]
    pq.write_table(table(empty=pa.nulls(COUNT)), tmp_path / "0.parquet")
    for number, other in enumerate(others, 1):
        pq.write_table(other, tmp_path / f"{number}.parquet")
    data = config(tmp_path, tmp_path)
    fields = {"image": "image", "text": "text", "late": "late", "empty": "empty"}
    source = build_source({**data, "fields": fields})
    assert len(source) == 5 * COUNT
    for name, files in {
        "image": range(5),
        "text": (0, 1, 2, 4),
        "late": (1,),
        "empty": (1,),
    }.items():
        record = source.fetch(np.arange(5 * COUNT), [name])
        sound = np.flatnonzero([not fault for fault in record[FAULT]]) // COUNT
        assert set(sound) == set(files) and len(sound) == COUNT * len(files)
    assert record["image"].tolist() == [b""] * 5 * COUNT  # not asked for
    assert source.fetch(np.arange(5 * COUNT), ["image"])["image"].tolist() == IMAGES * 5


def test_partitioned_folders(tmp_path):
    written = table(part=["a", "b"] * (COUNT // 2))
    pq.write_to_dataset(written, tmp_path / "hive", partition_cols=["part"])
    pattern = f"{tmp_path}/hive/**/*.parquet"
    message = refused(config(tmp_path / "hive", tmp_path), "no file .*parquet in it, but there are")
    assert f"set data.path={pattern!r}" in message
    source = build_source(config(pattern, tmp_path))
    assert sorted(source.column("text")) == sorted(text.encode() for text in TEXTS)


def test_text_that_is_not_utf_8_is_a_bad_example_and_no_traceback(tmp_path):
    raw = [text.encode() for text in TEXTS]
    raw[3] = "caf\u00e9".encode("latin-1")
    broken = pa.array(raw, pa.binary()).view(pa.string())  # as a writer that does not check
    lists = pa.ListArray.from_arrays(pa.array(range(COUNT + 1), pa.int32()), broken)
    meta = pa.StructArray.from_arrays([broken], names=["caption"])
    pq.write_table(table(text=broken, captions=lists, meta=meta), tmp_path / "x.parquet")
    with pytest.raises(UnicodeDecodeError):
        pq.read_table(tmp_path / "x.parquet").to_pylist()
    from vlp_jax.data.pipeline import EvalPipeline

    for name in ("text", "captions", "meta.caption"):
        data = config(tmp_path / "x.parquet", tmp_path, fields={"text": name}, max_bad_fraction=1.0)
        data["preprocess"] = {"choose_text": {"field": "text"}}
        pipeline = EvalPipeline(data, None, batch_size=COUNT, extra_fields=["text_raw"])
        (batch,) = pipeline.batches()
        assert batch["text_raw"][batch["mask"]].tolist() == raw[:3] + raw[4:]
        assert pipeline.faults.totals()["bad"] == {"data": {"malformed text": 1}}


def test_class_names_of_datasets_are_read(tmp_path):
    note = {"info": {"features": {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}}}
    written = table(label=[0, 1] * (COUNT // 2))
    written = written.replace_schema_metadata({"huggingface": json.dumps(note)})
    pq.write_table(written, tmp_path / "x.parquet")
    assert build_source(config(tmp_path / "x.parquet", tmp_path)).class_names("label") == (
        "cat",
        "dog",
    )

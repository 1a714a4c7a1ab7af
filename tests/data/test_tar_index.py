"""The index of tar files against Python's tarfile and the webdataset package."""

import io
import json
import tarfile

import numpy as np
import pytest

from vlp_jax.data.faults import FAULT
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.shards import DAMAGED, OK, TRUNCATED
from vlp_jax.data.sources.tar_index import index_tar, members, split_name
from vlp_jax.data.sources.webdataset import WebDatasetSource
from vlp_jax.errors import UserError


def write(path, files, tar_format=tarfile.PAX_FORMAT):
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in files:
            if content is None:
                info = tarfile.TarInfo(name)
                info.type = tarfile.DIRTYPE
                tar.addfile(info)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


LONG = "folder/" * 30 + "name"
FILES = [
    ("dir", None),
    ("dir/a.jpg", b"A" * 700),
    ("dir/a.txt", b"text of a"),
    ("b.JPG", b"B" * 512),
    ("b.seg.png", b"S"),
    ("b.txt", b""),
    (f"{LONG}.jpg", b"L" * 1000),
    (f"{LONG}.txt", "long \u00e9".encode()),
    ("\u00e9\u4e2d.jpg", b"U"),
    ("no_extension", b"left out"),
    (".hidden", b"left out"),
]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_are_those_of_tarfile(tmp_path, kind):
    files = [f for f in FILES if kind != tarfile.USTAR_FORMAT or len(f[0]) < 100]
    path = write(tmp_path / "x.tar", files, kind)
    raw = path.read_bytes()
    with tarfile.open(path) as tar:
        expected = [(m.name, m.offset_data, m.size) for m in tar if m.isfile()]
    found = list(members(str(path)))
    assert [(m.name, m.offset, m.size) for m in found] == expected
    assert all(m.fault == OK for m in found)
    contents = {m.name: raw[m.offset : m.offset + m.size] for m in found}
    assert contents == {name: content for name, content in files if content is not None}


def test_samples_are_those_of_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    path = write(tmp_path / "x.tar", FILES)
    index = index_tar(str(path))
    raw = path.read_bytes()
    ours = []
    for row, key in enumerate(index["key"]):
        sample = {"__key__": key.decode()}
        for column, extension in enumerate(index["extension"]):
            offset, size = index["offset"][row, column], index["size"][row, column]
            if size >= 0:
                sample[str(extension)] = raw[offset : offset + size]
        ours.append(sample)
    theirs = [
        {k: v for k, v in sample.items() if not k.startswith("__") or k == "__key__"}
        for sample in webdataset.WebDataset(str(path), shardshuffle=False)
    ]
    assert ours == theirs


def test_names():
    assert split_name("a/b.c/d.e.JPG") == ("a/b.c/d", "e.jpg")
    assert split_name("x") == ("x", "") and split_name("a/.b") == ("a/.b", "")


@pytest.mark.parametrize("cut, fault, count", [(100, TRUNCATED, 3), (700, TRUNCATED, 3)])
def test_a_file_that_is_cut(tmp_path, cut, fault, count):
    files = [(f"{n}.jpg", bytes([n]) * 1000) for n in range(4)]
    path = write(tmp_path / "x.tar", files)
    path.write_bytes(path.read_bytes()[: 2 * 1536 + cut])
    index = index_tar(str(path))
    assert index["fault"].tolist() == [OK, OK, fault] and len(index["key"]) == count


def test_a_damaged_header_ends_the_archive(tmp_path):
    path = write(tmp_path / "x.tar", [(f"{n}.jpg", b"x" * 1000) for n in range(4)])
    raw = bytearray(path.read_bytes())
    raw[1536 + 3] ^= 0xFF
    path.write_bytes(raw)
    assert index_tar(str(path))["fault"].tolist() == [OK, DAMAGED]
    # No zeros at the end are no fault: many writers leave them out.
    path = write(tmp_path / "y.tar", [(f"{n}.jpg", b"x" * 1000) for n in range(4)])
    path.write_bytes(path.read_bytes()[: 4 * 1536])
    assert index_tar(str(path))["fault"].tolist() == [OK] * 4


def test_fields_of_samples(tmp_path):
    def note(n):
        return json.dumps({"caption": f"c{n}", "width": n, "score": n / 2, "tags": ["x"] * (n + 1),
                           "nothing": None, "ok": True}).encode()  # fmt: skip

    files = []
    for n in range(3):
        files += [
            (f"{n}.{('jpg', 'png', 'webp')[n]}", b"image %d" % n),
            (f"{n}.json", note(n)),
            (f"{n}.cls", b" %d\n" % n),
        ]
    write(tmp_path / "x.tar", files)
    source = WebDatasetSource(str(tmp_path / "x.tar"), cache_dir=str(tmp_path / "cache"))
    assert set(source.fields()) == {
        *("image", "id", "jpg", "png", "webp", "json", "cls"),
        *("json.caption", "json.width", "json.score", "json.tags", "json.ok"),
    }
    record = source.fetch(np.arange(3))
    assert record[FAULT].tolist()[0] != b""  # it lacks png, which only others have
    wanted = ["image", "id", "cls", "json.caption", "json.width", "json.score", "json.tags"]
    record = source.fetch(np.arange(3), wanted)
    assert record[FAULT].tolist() == [b""] * 3
    assert record["image"].tolist() == [b"image 0", b"image 1", b"image 2"]
    assert record["cls"].tolist() == record["json.width"].tolist() == [0, 1, 2]
    assert record["json.score"].tolist() == [0, 0.5, 1]
    assert record["json.tags/count"].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="unknown key 'txt'.*data.fields.text.*known: cls, id, im"):
        build_source({"source": "webdataset", "path": str(tmp_path / "x.tar"),
                      "cache_dir": str(tmp_path / "cache"), "fields": {"text": "txt"}})  # fmt: skip


def test_values_that_do_not_fit_and_fields_that_only_some_have(tmp_path):
    def sample(n, document, label):
        return [
            (f"{n}.jpg", b"image"),
            (f"{n}.json", json.dumps(document).encode()),
            (f"{n}.cls", label),
        ]

    files = [
        *sample(0, {"hash": 1, "score": 1}, b"1"),
        *sample(1, {"hash": 2**63, "score": 0.5}, b"-1"),
        *sample(2, {"score": 2}, b"9" * 20),
    ]
    path = str(write(tmp_path / "x.tar", files))
    source = WebDatasetSource(path, cache_dir=str(tmp_path / "cache"))
    reasons = {
        name: [b"missing field" in fault for fault in source.fetch(np.arange(3), [name])[FAULT]]
        for name in ("cls", "json.hash", "json.score")
    }
    assert reasons == {
        "cls": [False, False, True],
        "json.hash": [False, True, True],
        "json.score": [False] * 3,
    }
    assert source.fetch(np.arange(3), ["json.score"])["json.score"].tolist() == [1, 0.5, 2]
    # Where a record lacks the field it equals nothing, not even 0.
    data = {"source": "webdataset", "path": path, "cache_dir": str(tmp_path / "cache")}
    fields = {"id": "id", "hash": "json.hash"}
    assert len(build_source({**data, "fields": fields, "where": {"hash": 1}})) == 1
    with pytest.raises(UserError, match="matches none of 3"):
        build_source({**data, "fields": fields, "where": {"hash": 0}})
    assert set(build_source(data).fields()) == {"image", "id", "label"}


def test_damaged_long_names_end_the_archive(tmp_path):
    for body in (b"0 path=x\n", b"zz path=x\n", b"999 path=x\n"):
        path = write(tmp_path / "x.tar", [(f"{LONG}.jpg", b"x")])
        raw = path.read_bytes()
        start = raw.index(b"path=") - 4
        path.write_bytes(raw[:start] + body + raw[start + len(body) :])
        assert index_tar(str(path))["fault"].tolist() == [DAMAGED]

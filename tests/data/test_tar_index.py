"""The index of tar files against Python's tarfile and the webdataset package."""

import io
import json
import tarfile

import numpy as np
import pytest

from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.shards import DAMAGED, OK, TRUNCATED
from vlp_jax.data.sources.tar_index import index_tar, members, split_name
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
    source = build_source({"source": "webdataset", "path": str(tmp_path / "x.tar"),
                           "cache_dir": str(tmp_path / "cache")})  # fmt: skip
    assert set(source.fields()) == {
        *("image", "id", "jpg", "png", "webp", "json", "cls"),
        *("json.caption", "json.width", "json.score", "json.tags", "json.ok"),
    }
    record = source.fetch(np.arange(3))
    assert record["fault"].tolist()[0] != b""  # it lacks png, which only others have
    wanted = ["image", "id", "cls", "json.caption", "json.width", "json.score", "json.tags"]
    record = source.fetch(np.arange(3), wanted)
    assert record["fault"].tolist() == [b""] * 3
    assert record["image"].tolist() == [b"image 0", b"image 1", b"image 2"]
    assert record["cls"].tolist() == record["json.width"].tolist() == [0, 1, 2]
    assert record["json.score"].tolist() == [0, 0.5, 1]
    assert record["json.tags/count"].tolist() == [1, 2, 3]
    with pytest.raises(UserError, match="unknown key 'txt'.*data.fields.text.*known: cls, id, im"):
        build_source({"source": "webdataset", "path": str(tmp_path / "x.tar"),
                      "cache_dir": str(tmp_path / "cache"), "fields": {"text": "txt"}})  # fmt: skip

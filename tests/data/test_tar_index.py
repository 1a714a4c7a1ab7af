"""The index of tar files against Python's tarfile and the webdataset package."""

import io
import json
import subprocess
import tarfile

import numpy as np
import pytest

from vlp_jax.data.faults import FAULT
from vlp_jax.data.sources import build_source
from vlp_jax.data.sources.shards import APART, DAMAGED, OK, SPARSE, TRUNCATED, TWICE
from vlp_jax.data.sources.tar_index import (
    index_tar,
    members,
    sample_files,
    sample_key,
    split_name,
)
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
    for row in range(len(index["fault"])):
        sample = {"__key__": sample_key(index, row).decode()}
        for extension, (offset, size) in sample_files(index, row).items():
            sample[extension] = raw[offset : offset + size]
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
    assert index["fault"].tolist() == [OK, OK, fault] and len(index["key_end"]) == count


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


def mac(name):
    """What macOS adds beside a file of a tar: its attributes."""
    folder, slash, file = name.rpartition("/")
    return (f"{folder}{slash}._{file}", b"\0\5\x16\7" + bytes(100))


SAMPLES = [(f"{n:03}.{end}", f"{end} {n}".encode()) for n in range(4) for end in ("jpg", "txt")]
FORMS = {
    "ustar": (SAMPLES, {"format": tarfile.USTAR_FORMAT}),
    "gnu, long names": ([(f"{LONG}{n}", c) for n, c in SAMPLES], {"format": tarfile.GNU_FORMAT}),
    "pax, long names": ([(f"{LONG}{n}", c) for n, c in SAMPLES], {"format": tarfile.PAX_FORMAT}),
    "pax, global header": (SAMPLES, {"pax_headers": {"comment": "by hand"}}),
    "./ in front": ([("./", None), *((f"./{n}", c) for n, c in SAMPLES)], {}),
    "a folder": ([("images/", None), *((f"images/{n}", c) for n, c in SAMPLES)], {}),
    "macOS": (
        [file for sample in SAMPLES for file in (mac(sample[0]), sample)] + [(".DS_Store", b"x")],
        {},
    ),
    "capital endings": ([(n.upper(), c) for n, c in SAMPLES], {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_tars_are_read_as_webdataset_reads_them(tmp_path, form):
    webdataset = pytest.importorskip("webdataset")
    files, settings = FORMS[form]
    with tarfile.open(tmp_path / "x.tar", "w", **settings) as tar:
        for name, content in files:
            info = tarfile.TarInfo(name)
            info.type = tarfile.DIRTYPE if content is None else tarfile.REGTYPE
            info.size = len(content or b"")
            tar.addfile(info, io.BytesIO(content or b""))
        for kind in (tarfile.LNKTYPE, tarfile.SYMTYPE):  # hold nothing of their own
            info = tarfile.TarInfo("link.jpg")
            info.type, info.linkname = kind, files[-1][0]
            tar.addfile(info)
    source = WebDatasetSource(str(tmp_path / "x.tar"), cache_dir=str(tmp_path / "cache"))
    record = source.fetch(np.arange(len(source)), ["id", "image", "text"])
    assert record[FAULT].tolist() == [b""] * 4
    theirs = webdataset.WebDataset(str(tmp_path / "x.tar"), shardshuffle=False)
    theirs = [(s["__key__"].encode(), s["jpg"], s["txt"]) for s in theirs if "jpg" in s]
    ours = zip(record["id"], record["image"], record["text"], strict=True)
    assert [row for row in ours] == theirs and len(theirs) == 4


PAIR = [("b.jpg", b"1"), ("b.txt", b"one"), ("b.jpg", b"2"), ("b.txt", b"two")]
KEYS_TWICE = {
    "side by side": (PAIR, [OK, TWICE, TWICE, OK]),
    "in upper and lower case": ([PAIR[0], ("b.JPG", b"2"), PAIR[1]], [OK, TWICE, TWICE, OK]),
    "one file added again": ([*PAIR[:2], PAIR[1]], [OK, TWICE, TWICE, OK]),
    "by endings": ([PAIR[0], PAIR[2], PAIR[1], PAIR[3]], [OK, TWICE, TWICE, OK]),
    # webdataset gives two samples of one key, and so do we: nothing is lost.
    "not side by side": ([*PAIR[:2], ("m.jpg", b"m"), *PAIR[2:]], [OK] * 5),
    "halves apart": ([PAIR[0], ("m.jpg", b"m"), PAIR[1]], [OK, APART, OK, APART, OK]),
}


@pytest.mark.parametrize("case", KEYS_TWICE)
def test_no_sample_of_a_key_that_occurs_twice_is_lost_in_silence(tmp_path, case):
    webdataset = pytest.importorskip("webdataset")
    files, expected = KEYS_TWICE[case]
    path = write(tmp_path / "x.tar", [("a.jpg", b"a"), *files, ("z.jpg", b"z")])
    index = index_tar(str(path))
    assert index["fault"].tolist() == expected
    source = WebDatasetSource(str(path), cache_dir=str(tmp_path / "cache"))
    record = source.fetch(np.arange(len(source)), ["image"])
    ambiguous = [b"ambiguous example" in fault for fault in record[FAULT]]
    assert ambiguous == [fault in (TWICE, APART) for fault in expected]
    samples = iter(webdataset.WebDataset(str(path), shardshuffle=False))
    if TWICE in expected:
        assert "b" in source.describe(1) and b"twice" in record[FAULT][1]
        with pytest.raises(ValueError, match="duplicate file name"):
            list(samples)
    else:
        assert [s["__key__"] for s in samples] == [
            sample_key(index, row).decode() for row in range(len(expected))
        ]


def test_several_images_of_a_sample_are_no_image_unless_one_is_named(tmp_path):
    files = [("a.jpg", b"photo"), ("a.png", b"mask"), ("b.jpg", b"photo")]
    data = {"source": "webdataset", "path": str(write(tmp_path / "x.tar", files))}
    data["cache_dir"] = str(tmp_path / "cache")
    record = build_source(data).fetch(np.arange(2), ["image"])
    assert b"several images (jpg, png): name one by data.fields.image" in record[FAULT][0]
    assert record["image"][1] == b"photo" and record[FAULT][1] == b""
    named = build_source({**data, "fields": {"image": "jpg"}}).fetch(np.arange(2))
    assert named["jpg"].tolist() == [b"photo"] * 2 and named[FAULT].tolist() == [b""] * 2


def test_a_tar_packed_by_endings_is_refused_with_the_way_to_pack_it(tmp_path):
    files = [(f"{n}.{end}", b"x") for end in ("jpg", "txt") for n in range(3)]
    path = write(tmp_path / "x.tar", files)
    with pytest.raises(UserError, match="sample 0 of .*x.tar: .*side by side.*tar --sort=name"):
        WebDatasetSource(str(path), cache_dir=str(tmp_path / "cache")).fields()
    # Sorted, as that command packs it, it is read.
    path = write(tmp_path / "y.tar", sorted(files))
    assert len(WebDatasetSource(str(path), cache_dir=str(tmp_path / "cache"))) == 3


@pytest.mark.parametrize("name", ["{:06}.{:x}.jpg", "one.{:06}.{:x}.jpg", "{:06}/x.{:x}.jpg"])
def test_an_index_grows_with_the_files_and_says_what_dots_did(tmp_path, name):
    sizes = []
    for count in (200, 800):
        files = [(name.format(n, n * 7919), b"x") for n in range(count)]
        path = write(tmp_path / f"{count}.tar", files)
        sizes.append(sum(column.nbytes for column in index_tar(str(path)).values()))
    assert sizes[1] < 5 * sizes[0] and sizes[1] < path.stat().st_size / 8
    data = {"source": "webdataset", "path": str(path), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"data.fields.image='jpg': a key ends at the first dot"):
        build_source({**data, "fields": {"image": "jpg"}})
    first = split_name(files[0][0])[1]
    assert build_source({**data, "fields": {"image": first}}).fetch(np.arange(1))[first] == [b"x"]


def test_sparse_files_and_what_follows_an_archive_are_told(tmp_path):
    content = bytes(1 << 20) + b"end"
    for name in ("a.bmp", "b.jpg"):
        (tmp_path / name).write_bytes(content if name == "a.bmp" else b"sound")
    with open(tmp_path / "a.bmp", "r+b") as stream:  # a hole, which tar --sparse leaves out
        stream.truncate(0)
        stream.seek(1 << 20)
        stream.write(b"end")
    for form in ("gnu", "posix"):
        command = ["tar", "--sparse", f"--format={form}", "-cf", "x.tar", "a.bmp", "b.jpg"]
        subprocess.run(command, cwd=tmp_path, check=True)
        found = list(members(str(tmp_path / "x.tar")))
        assert [(m.name, m.fault) for m in found] == [("a.bmp", SPARSE), ("b.jpg", OK)]
        with tarfile.open(tmp_path / "x.tar") as tar:
            assert tar.getmember("b.jpg").offset_data == found[1].offset
    whole = write(tmp_path / "y.tar", [("a.jpg", b"a")]).read_bytes()
    (tmp_path / "y.tar").write_bytes(whole * 2)
    assert index_tar(str(tmp_path / "y.tar"))["fault"].tolist() == [OK, DAMAGED]
    (tmp_path / "y.tar").write_bytes(whole + bytes(100_000))
    assert index_tar(str(tmp_path / "y.tar"))["fault"].tolist() == [OK]


def test_fields_that_only_later_samples_have_can_be_named(tmp_path):
    def note(n):
        late = {"caption": None}
        if n >= 25:
            late = {"caption": f"c{n}", "score": 0.5, "tags": ["x"], "size": {"w": n}}
        return json.dumps({"score": n, **late} if n else {}).encode()

    files = []
    for n in range(30):
        files += [(f"{n:02}.jpg", b"x"), (f"{n:02}.json", note(n))]
        files += [(f"{n:02}.txt", b"t"), (f"{n:02}.mask", b"m")] if n == 29 else []
    data = {"source": "webdataset", "path": str(write(tmp_path / "x.tar", files))}
    data["cache_dir"] = str(tmp_path / "cache")
    fields = {"text": "json.caption", "score": "json.score", "tags": "json.tags", "m": "mask"}
    source = build_source({**data, "fields": fields})
    assert not source.fields()["score"].is_string and source.fields()["tags"].shape == (None,)

    def read(name):
        record = source.fetch(np.arange(30), [name])
        there = [b"missing field" not in fault for fault in record[FAULT]]
        return record[fields[name]], np.flatnonzero(there).tolist()

    assert read("text")[1] == read("tags")[1] == list(range(25, 30)) and read("m")[1] == [29]
    values, there = read("score")  # whole numbers at first, then others
    assert there == list(range(1, 30)) and values[24:26].tolist() == [24, 0.5]
    assert "text" in build_source(data).fields()  # of one sample of thirty
    nested = build_source({**data, "fields": {"side": "json.size.w"}}).fetch(np.arange(30))
    assert nested["json.size.w"][25:].tolist() == list(range(25, 30))
    with pytest.raises(UserError, match="'json.captoin' in the 30 samples.*mean 'json.caption'"):
        build_source({**data, "fields": {**fields, "text": "json.captoin"}})

"""tools.prepare_data on damaged inputs, and misused."""

import csv
import json
import os
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402
from prepare_cases import (  # noqa: E402
    add,
    encode,
    make_job,
    read,
    write_folder,
    write_parquet,
    write_tars,
)

from vlp_jax.commands import prepare_data  # noqa: E402
from vlp_jax.data import faults  # noqa: E402
from vlp_jax.data.prepare import job as jobs  # noqa: E402
from vlp_jax.data.prepare import shards as shard_files  # noqa: E402
from vlp_jax.errors import UserError  # noqa: E402


def test_damaged_images_and_captions_of_a_folder_are_skipped_by_reason(tmp_path, capsys):
    root = tmp_path / "in"
    root.mkdir()
    good = encode("jpg", 0)
    files = {f"good{i:02d}.jpg": good for i in range(30)}
    files |= {
        "empty.jpg": b"",
        "page.jpg": b"<html>not found</html>",
        "header.png": encode("png", 1)[:20],
        "cut.jpg": encode("jpg", 2, size=64)[:-400],
        "silent.jpg": good,
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    rows = [(name, "" if name == "silent.jpg" else f"of {name}") for name in files]
    rows += [("absent.jpg", "nothing there"), ("", "of nothing")]
    with (root / "captions.tsv").open("w", newline="") as stream:
        csv.writer(stream, delimiter="\t").writerows([("file", "text"), *rows])

    command = ["--input", str(root), "--input-format", "folder", "--output-format", "tfrecord"]
    command += ["--shards", "2", "--max-bad-fraction", "0.3"]
    counts = {faults.EMPTY_TEXT: 1, faults.MISSING_FIELD: 2, faults.UNDECODABLE: 3}
    for name, more in (("headers", []), ("pixels", ["--check-images"])):
        out = tmp_path / name
        assert prepare_data.main([*command, *more, "--output", str(out)]) == 0
        expected = {**counts, faults.UNDECODABLE: 3 + len(more)}  # the cut one by its pixels alone
        manifest = json.loads((out / "train.manifest.json").read_text())
        assert manifest["skipped"] == expected
        found = {e["id"] for e in read(out, manifest)}
        cut = set() if more else {"cut.jpg"}
        assert found == {f"good{i:02d}.jpg" for i in range(30)} | cut
        said = capsys.readouterr().out
        assert f"skipped {3 + len(more)}: undecodable image" in said
        assert "page.jpg" in said and "absent.jpg" in said

    out = tmp_path / "strict"
    assert prepare_data.main([*command, "--output", str(out), "--max-bad-fraction", "0.1"]) == 2
    assert "6 of 37 examples cannot be used" in capsys.readouterr().err
    assert os.listdir(out) == []


def test_a_header_may_be_longer_than_what_is_read_first(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    image.save(root / "profile.jpg", icc_profile=bytes(20_000))
    image.save(root / "whole.webp", lossless=True)
    assert (root / "whole.webp").stat().st_size > 20_000
    (root / "cut.webp").write_bytes((root / "whole.webp").read_bytes()[:-9000])
    rows = "".join(f"{name},text\n" for name in ("profile.jpg", "whole.webp", "cut.webp"))
    (root / "captions.csv").write_text("file,caption\n" + rows)
    job = make_job(str(root), "folder", tmp_path / "out", shards=1, max_bad_fraction=0.5)
    manifest = jobs.prepare(job).manifest
    ids = {example["id"] for example in read(tmp_path / "out", manifest)}
    assert ids == {"profile.jpg", "whole.webp"}
    assert manifest["skipped"] == {faults.UNDECODABLE: 1}


MALFORMED = {
    "latin": "näme".encode("latin-1"),
    "utf16": "näme".encode("utf-16"),
    "unmarked": "name".encode("utf-16-le"),
}


def test_damaged_tars_and_members_are_skipped_by_reason(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    image = encode("png", 0, size=64)
    with tarfile.open(root / "0.tar", "w") as tar:
        for i in range(20):
            add(tar, f"{i:02d}.png", image)
            add(tar, f"{i:02d}.txt", f"of {i}".encode())
        add(tar, "no_image.txt", b"a text")
        add(tar, "no_text.png", image)
        add(tar, "blank.png", image)
        add(tar, "blank.txt", b" \n")
        for name, text in MALFORMED.items():
            add(tar, f"{name}.png", image)
            add(tar, f"{name}.txt", text)
        for _ in range(2):  # two samples of one key
            add(tar, "twice.png", image)
            add(tar, "twice.TXT", b"which?")
        add(tar, "both.png", image)
        add(tar, "both.jpg", image)
        add(tar, "both.txt", b"of one of them")
    whole = (root / "0.tar").read_bytes()
    inside_image = 5 * (512 + -(-len(image) // 512) * 512 + 1024) + 600
    (root / "cut.tar").write_bytes(whole[:inside_image])
    at_border = inside_image - 600
    (root / "border.tar").write_bytes(whole[:at_border])
    garbage = bytearray(whole)
    garbage[at_border : at_border + 512] = b"x" * 512
    (root / "garbage.tar").write_bytes(garbage)

    out = tmp_path / "out"
    result = jobs.prepare(make_job(str(root), "webdataset", out, max_bad_fraction=0.8))
    assert result.manifest["skipped"] == {
        faults.EMPTY_TEXT: 1,
        faults.MISSING_FIELD: 2,
        faults.MALFORMED_TEXT: len(MALFORMED),
        faults.AMBIGUOUS: 3,
        faults.TRUNCATED: 3,
    }
    ids = sorted(e["id"] for e in read(out, result.manifest))
    expected = [f"0/{i:02d}" for i in range(20)]
    for cut in ("border", "cut", "garbage"):
        expected += [f"{cut}/{i:02d}" for i in range(5)]
    assert ids == sorted(expected)
    assert any(
        "sample 05 of" in line and "cut.tar" in line
        for line in result.examples_named[faults.TRUNCATED]
    )


def test_damaged_parquet_is_skipped_by_reason(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    image = encode("png", 0)
    images = [image] * 20 + [None, b"<html>", image, image, image]
    texts = pa.array([b"of it"] * 22 + [b"", None, b"caf\xe9"])
    # A plain column of bytes, and text that its writer did not check.
    table = pa.table({"image": images, "text": texts.view(pa.string())})
    pq.write_table(table, root / "good.parquet", row_group_size=7)
    data = (root / "good.parquet").read_bytes()
    (root / "cut.parquet").write_bytes(data[: len(data) // 2])
    job = make_job(str(root), "parquet", tmp_path / "out", max_bad_fraction=0.6)
    result = jobs.prepare(job)
    assert result.manifest["skipped"] == {
        faults.MISSING_FIELD: 2,
        faults.UNDECODABLE: 1,
        faults.EMPTY_TEXT: 1,
        faults.MALFORMED_TEXT: 1,
        faults.TRUNCATED: 1,
    }
    ids = sorted(e["id"] for e in read(tmp_path / "out", result.manifest))
    assert ids == sorted(f"good#{i}" for i in range(20))


@pytest.mark.parametrize("content", [b"", b"<html>503</html>" * 100], ids=["empty", "page"])
def test_lost_files_count_as_many_as_the_others_hold(tmp_path, content):
    pattern, fields, _ = write_tars(tmp_path / "tars")  # of 8, 8 and 7
    (tmp_path / "tars" / "00001.tar").write_bytes(content)
    job = make_job(pattern, "webdataset", tmp_path / "out", fields=fields, max_bad_fraction=0.3)
    with pytest.raises(UserError, match="8 of 23 .*1 truncated shard.*7 that 1 files lack"):
        jobs.prepare(job)
    job = make_job(pattern, "webdataset", tmp_path / "out", fields=fields, max_bad_fraction=0.4)
    assert jobs.prepare(job).manifest["skipped"] == {faults.TRUNCATED: 1}


def test_a_tar_packed_by_endings_is_told_with_the_way_to_pack_it(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for end, content in (("png", encode("png", 0)), ("txt", b"text")):
            for key in "abc":
                add(tar, f"{key}.{end}", content)
    job = make_job(str(tmp_path / "0.tar"), "webdataset", tmp_path / "out", shards=1)
    with pytest.raises(UserError, match="side by side.*tar --sort=name"):
        jobs.prepare(job)


def test_two_columns_of_one_name_are_named(tmp_path):
    arrays = [pa.array([b"x"]), pa.array(["a"]), pa.array(["b"])]
    table = pa.Table.from_arrays(arrays, names=["image", "text", "text"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(UserError, match="2 columns of .* are named 'text'"):
        jobs.prepare(make_job(str(tmp_path / "x.parquet"), "parquet", tmp_path / "out", shards=1))


def test_ids_that_occur_twice_are_an_error_that_names_both(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for key in ("a", "b", "a"):
            add(tar, f"{key}.png", encode("png", 0))
            add(tar, f"{key}.txt", b"text")
    job = make_job(str(tmp_path / "0.tar"), "webdataset", tmp_path / "out", shards=1)
    with pytest.raises(
        UserError, match=r"1 examples .* '0/a', in .*0.tar at byte 512 and in .*0.tar at byte 4608"
    ):
        jobs.prepare(job)


@pytest.mark.parametrize("mode", ["in_memory", "multi_threading"])
def test_an_image_that_changes_between_the_passes_is_named(tmp_path, monkeypatch, mode):
    pattern, fields, _ = write_folder(tmp_path / "in")
    image = tmp_path / "in" / "a.b" / "n003.gif"
    write, content = shard_files.write, image.read_bytes()

    def change_and_write(*arguments):
        image.write_bytes(content[:-1])
        write(*arguments)

    monkeypatch.setattr(shard_files, "write", change_and_write)
    flags = (f"--direct_running_mode={mode}",)
    job = make_job(pattern, "folder", tmp_path / "out", fields=fields, flags=flags)
    with pytest.raises(UserError, match=r"n003\.gif changed since it was listed") as raised:
        jobs.prepare(job)
    assert "\n" not in str(raised.value) and "while running" not in str(raised.value)
    deadline = time.monotonic() + 30  # the other worker ends the shard that it is writing
    while list((tmp_path / "out").glob(".*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_mistakes_are_one_line_that_says_what_there_is(tmp_path, capsys):
    tars, _, _ = write_tars(tmp_path / "tars")
    folder, _, _ = write_folder(tmp_path / "folder")
    parquet, _, _ = write_parquet(tmp_path / "parquet")
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b rest")
    texts = ["--fields", "text=texts"]
    for arguments, said in (
        (["--input", f"{tmp_path}/none/*.tar"], "matches no file"),
        (["--input", f"{tmp_path}/tars/0000{{0..4}}.tar"], "2 of 5 files are not there"),
        (["--input", tars, "--fields", "image=tiff"], "cls, gif, jpg, json, png, webp"),
        (["--input", tars, "--fields", "image"], "is not NAME=INPUT"),
        (["--input", tars, "--fields", "text=txt", "captions=txt"], "names captions twice"),
        (["--input", str(tmp_path / "zipped.tar")], "is compressed by gzip, but cut short"),
        (["--input", tars, "--fields", "text=json.texts", "--shards", "99"], "more than the 23"),
        (["--input", tars, "--split", "a-b"], "letters, digits and underscores"),
        (["--input", tars, "--direct_num_wrokers=3"], "did you mean --direct_num_workers?"),
        (["--input", tars, "--fields", "text=json.texts", "--runner=Nonsense"], "DirectRunner"),
        (["--input", "nosuch://x/y.tar"], "nosuch"),
        (["--input-format", "folder", "--input", f"{tmp_path}/none"], "no such folder"),
        (["--input-format", "folder", "--input", folder, "--fields", "label=klass"], "'class'"),
        (
            ["--input-format", "parquet", "--input", parquet],
            "there are image, texts, label): name one by --fields text=",
        ),
        (["--input-format", "parquet", "--input", parquet, *texts, "x=y"], "--fields x=y: "),
    ):
        base = ["--output", str(tmp_path / "out"), "--output-format", "tfrecord"]
        base += ["--input-format", "webdataset", "--shards", "2"]
        assert prepare_data.main([*base, *arguments]) == 2, arguments
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert last.startswith("error: ") and said in last
    assert prepare_data.main(["--verify", "--output", str(tmp_path / "out")]) == 2
    assert "to verify" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*-of-*"))


def test_without_beam_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "apache_beam", None)
    command = ["--input", "x", "--input-format", "folder", "--output", str(tmp_path)]
    assert prepare_data.main([*command, "--output-format", "tfrecord", "--shards", "1"]) == 2
    assert "pip install -r requirements-prepare.txt" in capsys.readouterr().err

"""tools.prepare_data: read back by each format's own reader, stopped, damaged, misused."""

import csv
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("apache_beam")
pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq  # noqa: E402

from tools import prepare_data  # noqa: E402
from vlp_jax.data import faults  # noqa: E402
from vlp_jax.data.prepare import job as jobs  # noqa: E402
from vlp_jax.data.prepare import paths  # noqa: E402
from vlp_jax.data.prepare import shards as shard_files  # noqa: E402
from vlp_jax.errors import UserError  # noqa: E402

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
    return jobs.Job(inputs, input_format, str(output), output_format, **more)


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


@pytest.mark.parametrize("output_format", OUTPUTS)
@pytest.mark.parametrize("input_format", INPUTS)
def test_every_example_arrives_once_with_its_own_bytes(tmp_path, input_format, output_format):
    pattern, fields, ids = WRITE[input_format](tmp_path / "in")
    job = make_job(pattern, input_format, tmp_path / "out", output_format, fields=fields)
    manifest = jobs.prepare(job).manifest

    found = read(tmp_path / "out", manifest)
    assert len(found) == COUNT
    known = {name: rest for name, *rest in examples()}
    assert {e["id"] for e in found} == set(ids)
    for example in found:
        _, image, captions, label = known[ids[example["id"]]]
        assert example["image"] == image
        assert example["captions"] == captions
        assert example["label"] == [label]
    assert [s["examples"] for s in manifest["shards"]] == [5, 6, 6, 6]
    assert manifest["fields"] == {
        "id": {"dtype": "bytes", "list": False},
        "image": {"dtype": "bytes", "list": False},
        "captions": {"dtype": "bytes", "list": True},
        "label": {"dtype": "int64", "list": False},
    }
    assert manifest["skipped"] == {} and manifest["version"] == 1
    suffix = {"webdataset": "tar"}.get(output_format, output_format)
    names = [f"train-{i:05d}-of-00004.{suffix}" for i in range(4)]
    assert [s["file"] for s in manifest["shards"]] == names
    assert sorted(os.listdir(tmp_path / "out")) == [*names, "train.manifest.json"]
    assert json.loads((tmp_path / "out" / "train.manifest.json").read_text()) == manifest


@pytest.mark.parametrize("output_format", OUTPUTS)
def test_shards_depend_on_the_seed_but_not_on_input_order_or_workers(tmp_path, output_format):
    first, fields, _ = write_folder(tmp_path / "a")

    def whole_images(rows):  # captions of one image keep their order
        rows.sort(key=lambda row: hashlib.sha256(row[0].encode()).digest())

    second, _, _ = write_folder(tmp_path / "b", whole_images)
    outs = [tmp_path / f"out{i}" for i in range(3)]
    jobs.prepare(make_job(first, "folder", outs[0], output_format, fields=fields))
    one = ("--direct_num_workers=1",)
    jobs.prepare(make_job(second, "folder", outs[1], output_format, fields=fields, flags=one))
    other = jobs.prepare(make_job(first, "folder", outs[2], output_format, fields=fields, seed=1))
    assert contents(outs[0]) == contents(outs[1])
    assert contents(outs[0]).keys() == contents(outs[2]).keys()
    order = [e["id"] for e in read(outs[2], other.manifest)]
    assert order != sorted(order)
    assert all(contents(outs[0])[name] != contents(outs[2])[name] for name in contents(outs[0]))


def test_buckets_of_the_order_do_not_change_the_shards(tmp_path, monkeypatch):
    pattern, fields, _ = write_parquet(tmp_path / "in")
    jobs.prepare(make_job(pattern, "parquet", tmp_path / "one", fields=fields))
    monkeypatch.setattr(jobs.plan, "number_of_buckets", lambda estimate: 7)
    jobs.prepare(make_job(pattern, "parquet", tmp_path / "seven", fields=fields))
    assert contents(tmp_path / "one") == contents(tmp_path / "seven")


def test_the_order_is_uniform_over_shards():
    # Neighbours in the input land anywhere: over 4,000 examples each of 8 shards gets about an
    # eighth of every run of 500.
    from vlp_jax.data.prepare.examples import place

    ranks = np.argsort(np.argsort([place(3, f"x/{i:06d}") for i in range(4000)]))
    counts = [np.bincount(run * 8 // 4000, minlength=8) for run in ranks.reshape(8, 500)]
    assert np.abs(np.array(counts) - 62.5).max() < 5 * 62.5**0.5


def test_kill_in_the_middle_and_run_again(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    image = encode("bmp", 0, size=400)  # 480 kB, so that shards take long enough to be seen
    rows = [{"path": f"{i:03d}.bmp", "caption": f"{i}"} for i in range(300)]
    for row in rows:
        (source / row["path"]).write_bytes(image + row["path"].encode())
    (source / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "tools.prepare_data", "--input", str(source)]
    command += ["--input-format", "folder", "--output", str(out), "--shards", "60"]
    command += ["--output-format", "webdataset"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while len(list(out.glob("train-*.tar"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    before = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("train-*.tar")}
    assert 3 <= len(before) < 60, "it was not killed in the middle"
    assert not (out / "train.manifest.json").exists()
    leftover = out / ".train-00059-of-00060.tar.0123456789ab.tmp"
    leftover.write_bytes(b"half")

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    after = {p: (p.stat().st_mtime_ns, p.stat().st_ino) for p in out.glob("train-*.tar")}
    assert len(after) == 60 and before.items() <= after.items()
    assert not leftover.exists() and len(os.listdir(out)) == 61
    manifest = json.loads((out / "train.manifest.json").read_text())
    found = read(out, manifest)
    assert sorted(e["id"] for e in found) == [row["path"] for row in rows]
    assert all(e["image"] == image + e["id"].encode() for e in found)
    assert f'config.data.path = "{out}/train.manifest.json"' in done.stdout
    assert 'config.data.source = "webdataset"' in done.stdout
    fresh = tmp_path / "fresh"
    jobs.prepare(make_job(str(source), "folder", fresh, "webdataset", shards=60))
    assert contents(fresh) == contents(out)


def test_what_is_damaged_is_written_again_and_verify_finds_it(tmp_path, capsys):
    pattern, fields, _ = write_tars(tmp_path / "in")
    out = tmp_path / "out"
    job = make_job(pattern, "webdataset", out, fields=fields)
    manifest = jobs.prepare(job).manifest
    good = contents(out)
    first, second = (out / shard["file"] for shard in manifest["shards"][:2])
    verify = ["--verify", "--output", str(out)]
    assert prepare_data.main(verify) == 0
    assert f"{COUNT} examples in 4 shards" in capsys.readouterr().out

    data = bytearray(first.read_bytes())
    data[len(data) // 2] ^= 1
    first.write_bytes(data)
    second.write_bytes(second.read_bytes()[:-1])
    assert prepare_data.main(verify) == 2
    said = capsys.readouterr().err
    assert str(first) in said and str(second) in said and "2 of 4 shards" in said

    assert not jobs.prepare(job).was_finished  # a size that is wrong is seen without reading
    assert contents(out) == {**good, first.name: bytes(data)}
    again = make_job(pattern, "webdataset", out, fields=fields, verify=True)
    assert jobs.prepare(again).manifest == manifest
    assert contents(out) == good
    inodes = {p: p.stat().st_ino for p in out.iterdir()}
    assert jobs.prepare(again).was_finished
    assert inodes == {p: p.stat().st_ino for p in out.iterdir()}


def test_verify_looks_at_the_bytes_of_shards_that_an_ended_run_left(tmp_path, monkeypatch):
    pattern, fields, _ = write_folder(tmp_path / "in")
    out = tmp_path / "out"

    def stop(*arguments):
        raise RuntimeError("stopped before the manifest")

    with monkeypatch.context() as patch:
        patch.setattr(jobs.manifests, "write", stop)
        with pytest.raises(RuntimeError, match="stopped"):
            jobs.prepare(make_job(pattern, "folder", out, fields=fields))
    good = contents(out)
    shard = next(out.glob("*-of-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"\xff")
    jobs.prepare(make_job(pattern, "folder", out, fields=fields, verify=True))
    assert contents(out) == good


def test_another_job_in_the_folder_is_named_by_what_differs(tmp_path):
    pattern, fields, _ = write_tars(tmp_path / "in")
    out = tmp_path / "out"
    jobs.prepare(make_job(pattern, "webdataset", out, fields=fields))
    for change, said in (
        ({"seed": 3}, "seed was 0 and is now 3"),
        ({"shards": 5}, "source.shards was 4 and is now 5"),
        ({"examples_per_shard": 5}, "source.examples_per_shard was null and is now 5"),
        ({"fields": {**fields, "label": "json.label"}}, 'label was "cls" and is now "json.label"'),
        ({"output_format": "tfrecord"}, 'format was "array_record" and is now "tfrecord"'),
    ):
        with pytest.raises(UserError, match="holds another job: .*" + said):
            jobs.prepare(make_job(pattern, "webdataset", out, **{"fields": fields, **change}))
    with tarfile.open(tmp_path / "in" / "00001.tar", "w") as tar:
        add(tar, "x.jpg", encode("jpg", 1))
    with pytest.raises(UserError, match=r"source.files\[1\] was .*00001.tar"):
        jobs.prepare(make_job(pattern, "webdataset", out, fields=fields))
    (tmp_path / "in" / "00002.tar").unlink()
    some = str(tmp_path / "in" / "*.tar")
    with pytest.raises(UserError, match="source.files was 3 long and is now 2 long"):
        jobs.prepare(make_job(some, "webdataset", out, fields=fields))
    (out / "train.manifest.json").unlink()
    with pytest.raises(UserError, match="train-00000-of-00004.array_record, which no record"):
        jobs.prepare(make_job(some, "webdataset", out, fields=fields))
    other = make_job(some, "webdataset", out, fields={"captions": "json.texts"}, split="val")
    with pytest.raises(UserError, match="cannot be used"):  # 1 of 9 has no caption
        jobs.prepare(other)


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
        add(tar, "latin.png", image)
        add(tar, "latin.txt", "näme".encode("latin-1"))
    whole = (root / "0.tar").read_bytes()
    inside_image = 5 * (512 + -(-len(image) // 512) * 512 + 1024) + 600
    (root / "cut.tar").write_bytes(whole[:inside_image])
    at_border = inside_image - 600
    (root / "border.tar").write_bytes(whole[:at_border])
    garbage = bytearray(whole)
    garbage[at_border : at_border + 512] = b"x" * 512
    (root / "garbage.tar").write_bytes(garbage)

    out = tmp_path / "out"
    result = jobs.prepare(make_job(str(root), "webdataset", out, max_bad_fraction=0.5))
    assert result.manifest["skipped"] == {
        faults.EMPTY_TEXT: 1,
        faults.MISSING_FIELD: 2,
        faults.UNREADABLE: 1,
        faults.TRUNCATED: 3,
    }
    ids = sorted(e["id"] for e in read(out, result.manifest))
    expected = [f"0/{i:02d}" for i in range(20)]
    for cut in ("border", "cut", "garbage"):
        expected += [f"{cut}/{i:02d}" for i in range(5)]
    assert ids == sorted(expected)
    assert any("cut.tar, 05" in line for line in result.examples_named[faults.TRUNCATED])


def test_damaged_parquet_is_skipped_by_reason(tmp_path):
    root = tmp_path / "in"
    root.mkdir()
    image = encode("png", 0)
    images = [image] * 20 + [None, b"<html>", image, image]
    texts = ["of it"] * 22 + ["", None]
    table = pa.table({"image": images, "text": texts})  # a plain column of bytes
    pq.write_table(table, root / "good.parquet", row_group_size=7)
    data = (root / "good.parquet").read_bytes()
    (root / "cut.parquet").write_bytes(data[: len(data) // 2])
    job = make_job(str(root), "parquet", tmp_path / "out", max_bad_fraction=0.5)
    result = jobs.prepare(job)
    assert result.manifest["skipped"] == {
        faults.MISSING_FIELD: 2,
        faults.UNDECODABLE: 1,
        faults.EMPTY_TEXT: 1,
        faults.TRUNCATED: 1,
    }
    ids = sorted(e["id"] for e in read(tmp_path / "out", result.manifest))
    assert ids == sorted(f"good#{i}" for i in range(20))


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


def test_further_fields_take_their_types_from_all_examples(tmp_path):
    values = [(1, 0.5, "x", [1, 2]), (2, 3, "y", []), (3, 1.5, "z", [7])]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for i, (whole, real, text, several) in enumerate(values):
            add(tar, f"{i}.png", encode("png", i))
            add(tar, f"{i}.txt", b"text")
            add(tar, f"{i}.npy", bytes([255, i]))
            data = {"whole": whole, "size": {"real": real}, "text": text, "several": several}
            add(tar, f"{i}.json", json.dumps({**data, "odd": [1, "one", 2][i]}).encode())
    fields = {name: f"json.{name}" for name in ("whole", "text", "several")}
    fields = {"real": "json.size.real", "raw": "npy", "texts": "json.text", **fields}
    fields.pop("text")
    job = make_job(str(tmp_path), "webdataset", tmp_path / "out", shards=1, fields=fields)
    manifest = jobs.prepare(job).manifest
    types = {name: (f["dtype"], f["list"]) for name, f in manifest["fields"].items()}
    assert types["whole"] == ("int64", False) and types["several"] == ("int64", True)
    assert types["real"] == ("float32", False) and types["texts"] == ("bytes", False)
    assert types["raw"] == ("bytes", False)
    by_id = {e["id"]: e for e in read(tmp_path / "out", manifest)}
    for i, (whole, real, text, several) in enumerate(values):
        found = by_id[f"0/{i}"]
        assert found["whole"] == [whole] and found["real"] == [real]
        assert found["texts"] == [text.encode()] and found["raw"] == [bytes([255, i])]
        assert found["several"] == several
    for name, output_format, said in (
        ("json.odd", "tfrecord", "number in some examples and a string in others"),
        ("npy", "webdataset", "holds bytes"),
    ):
        job = make_job(
            str(tmp_path),
            "webdataset",
            tmp_path / "o2",
            output_format,
            shards=1,
            fields={"f": name},
        )
        with pytest.raises(UserError, match=said):
            jobs.prepare(job)


def test_urls_and_examples_per_shard(tmp_path):
    import fsspec

    pattern, fields, ids = write_tars(tmp_path / "in")
    fs = fsspec.filesystem("memory")
    for path in paths.expand_braces(pattern):
        fs.pipe_file(f"/data/in/{Path(path).name}", Path(path).read_bytes())
    url = "memory://data/in/{00000..00002}.tar"
    job = make_job(url, "webdataset", "memory://data/out", fields=fields, examples_per_shard=7)
    manifest = jobs.prepare(job).manifest
    local = make_job(pattern, "webdataset", tmp_path / "out", fields=fields, examples_per_shard=7)
    jobs.prepare(local)
    assert [s["examples"] for s in manifest["shards"]] == [5, 6, 6, 6]
    for name, data in contents(tmp_path / "out").items():
        assert fs.cat_file(f"/data/out/{name}") == data
    assert len(fs.ls("/data/out")) == 5 and len(ids) == COUNT
    assert jobs.prepare(job).was_finished


def test_brace_ranges():
    assert paths.expand_braces("a{08..10}.{tar,zip}") == [
        f"a{n}.{e}" for n in ("08", "09", "10") for e in ("tar", "zip")
    ]
    assert paths.expand_braces("{9..11}") == ["9", "10", "11"]
    assert paths.expand_braces("plain") == ["plain"]


def test_a_folder_a_glob_and_links_find_the_same_files(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "links").mkdir()
    for name in ("b.tar", "a.tar", "c.txt"):
        (tmp_path / "in" / name).write_bytes(name.encode() * 100)
        (tmp_path / "links" / name).symlink_to(tmp_path / "in" / name)
    for folder in ("in", "links"):
        root = str(tmp_path / folder)
        expected = [(f"{root}/a.tar", 500), (f"{root}/b.tar", 500)]
        for patterns in ([root], [f"{root}/*.tar"], [f"{root}/{{b,a}}.tar", f"{root}/a.tar"]):
            assert paths.find_files(patterns, ".tar") == expected


def test_mistakes_are_one_line_that_says_what_there_is(tmp_path, capsys):
    tars, _, _ = write_tars(tmp_path / "tars")
    folder, _, _ = write_folder(tmp_path / "folder")
    parquet, _, _ = write_parquet(tmp_path / "parquet")
    (tmp_path / "zipped.tar").write_bytes(b"\x1f\x8b rest")
    texts = ["--fields", "text=texts"]
    for arguments, said in (
        (["--input", f"{tmp_path}/none/*.tar"], "matches no .tar file"),
        (["--input", f"{tmp_path}/tars/0000{{0..4}}.tar"], "2 of 5 files are not there"),
        (["--input", tars, "--fields", "image=tiff"], "cls, gif, jpg, json, png, webp"),
        (["--input", tars, "--fields", "image"], "is not NAME=INPUT"),
        (["--input", tars, "--fields", "text=txt", "captions=txt"], "names captions twice"),
        (["--input", str(tmp_path / "zipped.tar")], "unpack it with gunzip"),
        (["--input", tars, "--fields", "text=json.texts", "--shards", "99"], "more than the 23"),
        (["--input", tars, "--split", "a-b"], "letters, digits and underscores"),
        (["--input", tars, "--direct_num_wrokers=3"], "did you mean --direct_num_workers?"),
        (["--input", tars, "--fields", "text=json.texts", "--runner=Nonsense"], "DirectRunner"),
        (["--input", "nosuch://x/y.tar"], "nosuch"),
        (["--input-format", "folder", "--input", f"{tmp_path}/none"], "no such folder"),
        (["--input-format", "folder", "--input", folder, "--fields", "label=klass"], "'class'"),
        (["--input-format", "parquet", "--input", parquet], "there are image, texts, label"),
        (["--input-format", "parquet", "--input", parquet, *texts, "x=y"], "no such column"),
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


def test_importing_the_tool_imports_neither_beam_nor_tensorflow():
    code = (
        "import sys, tools.prepare_data; "
        "print([m for m in ('apache_beam', 'tensorflow', 'fsspec', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"

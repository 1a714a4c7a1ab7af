"""tools.prepare_data: read back by each format's own reader, stopped, run again."""

import gzip
import hashlib
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

pytest.importorskip("apache_beam")
pa = pytest.importorskip("pyarrow")
from prepare_cases import (  # noqa: E402
    COUNT,
    INPUTS,
    OUTPUTS,
    ROOT,
    WRITE,
    add,
    contents,
    encode,
    examples,
    make_job,
    read,
    write_folder,
    write_parquet,
    write_tars,
)

from vlp_jax.commands import prepare_data  # noqa: E402
from vlp_jax.data import files  # noqa: E402
from vlp_jax.data.prepare import job as jobs  # noqa: E402
from vlp_jax.data.prepare.inputs import Input  # noqa: E402
from vlp_jax.data.sources import build_source  # noqa: E402
from vlp_jax.errors import UserError  # noqa: E402


@pytest.mark.parametrize(
    ("input_format", "output_format"),
    [
        pytest.param(one, other, marks=[] if (number - place) % 3 == 0 else pytest.mark.slow)
        for number, one in enumerate(INPUTS)
        for place, other in enumerate(OUTPUTS)
    ],
)
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
    path = str(tmp_path / "out" / "train.manifest.json")
    field = "json.label" if output_format == "webdataset" else "label"
    source = build_source({"source": output_format, "path": path, "fields": {"label": field}})
    # Words keep their names, which evaluators match; numbers are written as they are.
    names = tuple(f"class {n}" for n in range(4)) if input_format == "folder" else None
    assert source.class_names("label") == names


@pytest.mark.parametrize(
    "output_format", [OUTPUTS[0], *(pytest.param(o, marks=pytest.mark.slow) for o in OUTPUTS[1:])]
)
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


@pytest.mark.slow
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
        patch.setattr(jobs, "_write_manifest", stop)
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


def test_the_lines_for_a_config_give_the_same_fields_in_every_format(tmp_path, capsys):
    values = {"whole": 1, "real": 0.5, "name": "x", "texts": ["a", "b"], "several": [1, 2]}
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        add(tar, "0.png", encode("png", 0))
        add(tar, "0.txt", b"text")
        add(tar, "0.json", json.dumps(values).encode())
    fields = ["--fields", *(f"{name}=json.{name}" for name in values)]
    found = {}
    for output_format in OUTPUTS:
        out = ["--output", str(tmp_path / output_format), "--output-format", output_format]
        where = ["--input", str(tmp_path / "0.tar"), "--input-format", "webdataset"]
        assert prepare_data.main([*where, *out, *fields, "--shards", "1"]) == 0
        config = ConfigDict({"data": {"cache_dir": str(tmp_path / "cache")}})
        lines = capsys.readouterr().out.partition("To train on them:\n")[2].splitlines()
        for line in lines:
            exec(line.strip(), {"config": config})
        found[output_format] = dict(build_source(config.data).fields())
    assert set(found["tfrecord"]) == {"id", "image", "captions", *values}
    assert found["array_record"] == found["tfrecord"]
    del found["tfrecord"]["several"]  # a tar's numbers are not read as lists
    assert found["webdataset"] == found["tfrecord"]


def test_urls_and_examples_per_shard(tmp_path):
    import fsspec

    pattern, fields, ids = write_tars(tmp_path / "in")
    fs = fsspec.filesystem("memory")
    for path in files.expand_braces(pattern):
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


def test_gzipped_tars_are_read_as_plain_ones(tmp_path):
    pattern, fields, _ = write_tars(tmp_path / "in")
    plain = jobs.prepare(make_job(pattern, "webdataset", tmp_path / "plain", fields=fields))
    for file in (tmp_path / "in").iterdir():
        file.with_name(f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    packed = str(tmp_path / "in")
    packed = jobs.prepare(make_job(packed, "webdataset", tmp_path / "gz", fields=fields))
    assert packed.manifest["shards"] == plain.manifest["shards"]
    assert contents(tmp_path / "gz") == contents(tmp_path / "plain")


def test_brace_ranges():
    assert files.expand_braces("a{08..10}.{tar,zip}") == [
        f"a{n}.{e}" for n in ("08", "09", "10") for e in ("tar", "zip")
    ]
    assert files.expand_braces("{9..11}") == ["9", "10", "11"]
    assert files.expand_braces("plain") == ["plain"]


def test_a_folder_a_glob_and_links_find_the_same_files(tmp_path):
    _, fields, _ = write_tars(tmp_path / "in")
    (tmp_path / "links").mkdir()
    (tmp_path / "in" / "00002.tar").rename(tmp_path / "in" / "c.txt")
    for file in (tmp_path / "in").iterdir():
        (tmp_path / "links" / file.name).symlink_to(file)
    for folder in ("in", "links"):
        root = str(tmp_path / folder)
        names = [f"{root}/00000.tar", f"{root}/00001.tar"]
        expected = tuple((name, os.path.getsize(name)) for name in names)
        for patterns in ([root], [f"{root}/*.tar"], [f"{root}/0000{{1,0}}.tar", names[0]]):
            assert Input.open("webdataset", patterns, fields).files == expected


def test_importing_the_tool_imports_neither_beam_nor_tensorflow():
    code = (
        "import sys, vlp_jax.commands.prepare_data; "
        "print([m for m in ('apache_beam', 'tensorflow', 'fsspec', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"

"""Names of files, remote files, local copies, and what is said when something is not there."""

import gzip
import os
import tarfile
import threading

import corpora
import fsspec
import numpy as np
import pytest

from vlp_jax.data import files
from vlp_jax.data.files import expand, retrying
from vlp_jax.data.local_copies import LocalCopies, OpenFiles
from vlp_jax.data.pipeline import TrainPipeline
from vlp_jax.data.sources import build_source
from vlp_jax.errors import UserError


@pytest.fixture
def memory():
    """A folder on fsspec's file system in memory."""
    system = fsspec.filesystem("memory")
    system.store.clear()
    yield "memory://bucket/data"
    system.store.clear()


def test_patterns(tmp_path):
    for name in ("a-00.tar", "a-01.tar", "a-02.tar", "b.tar", "c.txt"):
        (tmp_path / name).write_text("x")
    (tmp_path / "empty").mkdir()

    def names(*patterns):
        given = [f"{tmp_path}/{p}" for p in patterns]
        found = expand(given[0] if len(given) == 1 else given, ".tar")
        return [os.path.basename(path) for path in found]

    assert names("a-{00..02}.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert names("{b,a-00}.tar") == ["a-00.tar", "b.tar"]
    assert names("a-*.tar", "a-00.tar") == ["a-00.tar", "a-01.tar", "a-02.tar"]
    assert names("") == ["a-00.tar", "a-01.tar", "a-02.tar", "b.tar"]
    assert names("a-0[12].tar") == ["a-01.tar", "a-02.tar"]
    for pattern, message in {
        "x*.tar": "matches no file",
        "nowhere.tar": "matches no file",
        "a-{00..05}.tar": "3 of 6 files are not there; the first is .*a-03.tar",
        "a-{00..05.tar": "matches no file|not closed",
        "empty": r"a folder with no file \*.tar",
    }.items():
        with pytest.raises(UserError, match=message):
            names(pattern)
    with pytest.raises(UserError, match="data.path is empty"):
        expand([], ".tar")


def gzipped(path, name=None):
    target = path.with_name(name or f"{path.name}.gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord"])
def test_a_folder_of_gzipped_shards_is_read(kind, tmp_path, caplog):
    data = corpora.config(kind, tmp_path, corpora.examples(12), shards=3)
    folder = tmp_path / kind
    data["path"] = str(folder)
    expected = sorted(build_source(data).column("id"))
    first, second, third = sorted(folder.iterdir())
    gzipped(first)
    first.unlink()
    if kind == "webdataset":
        gzipped(third, f"{third.stem}.tgz")
        third.unlink()
    assert sorted(build_source(data).column("id")) == expected
    # One that is there as it is too is read once.
    gzipped(second)
    assert sorted(build_source(data).column("id")) == expected
    assert f"the first is {second}.gz" in caplog.text


def test_content_decides_what_is_gzipped(tmp_path, memory):
    data = corpora.config("webdataset", tmp_path, corpora.examples(9), shards=3)
    first, second, _ = sorted((tmp_path / "webdataset").iterdir())
    expected = build_source(data).column("id").tolist()
    second.write_bytes(gzip.compress(second.read_bytes()))  # still .tar
    first.rename(first.with_name("00000.tar.gz"))  # what a browser has unpacked on its way
    files.stamp_of.cache_clear()
    assert build_source(data).column("id").tolist() == expected
    copied_to_memory(tmp_path / "webdataset", memory)
    assert build_source({**data, "path": memory}).column("id").tolist() == expected


def test_a_folder_without_shards_says_what_it_holds(tmp_path):
    def said(path):
        with pytest.raises(UserError) as error:
            expand(str(path), (".tar", ".tar.gz"))
        return str(error.value)

    (tmp_path / "a.tar.zst").write_bytes(b"\x28\xb5\x2f\xfd" + bytes(9))
    message = said(tmp_path)
    assert "no file *.tar, *.tar.gz in it; a.tar.zst is compressed by Zstandard" in message
    assert "unzstd a.tar.zst" in message
    (tmp_path / "a.tar.zst").rename(tmp_path / "notes")
    (tmp_path / "notes").write_text("hello")
    assert said(tmp_path).endswith("; it holds notes")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "x.tar").write_bytes(b"")
    assert f"set data.path='{tmp_path}/**/*.tar'" in said(tmp_path)


def test_schemes(memory):
    system = fsspec.filesystem("memory")
    for n in range(3):
        system.pipe(f"bucket/data/{n:05d}.tar", b"x")
    found = [f"memory:///bucket/data/{n:05d}.tar" for n in range(3)]

    def plain(paths):
        return [path.replace(":///", "://") for path in paths]

    assert plain(expand(f"{memory}/*.tar", ".tar")) == plain(found)
    assert plain(expand(memory, ".tar")) == plain(found)
    assert plain(expand(f"{memory}/{{00000..00002}}.tar", ".tar")) == plain(found)
    with pytest.raises(UserError, match="nosuch:// cannot be opened"):
        expand("nosuch://bucket/x", ".tar")


def copied_to_memory(folder, target):
    system = fsspec.filesystem("memory")
    for file in folder.iterdir():
        system.pipe(f"{target.removeprefix('memory://')}/{file.name}", file.read_bytes())


@pytest.mark.parametrize(
    "kind",
    ["webdataset", "array_record"]
    + [pytest.param(kind, marks=pytest.mark.slow) for kind in ("tfrecord", "parquet")],
)
def test_training_from_a_bucket_is_training_from_disk(kind, tmp_path, memory):
    data = corpora.config(kind, tmp_path, corpora.examples(60), shards=4, lanes=2)
    copied_to_memory(tmp_path / kind, memory)
    remote = {**data, "path": memory}

    def seen(config):
        pipeline = TrainPipeline(config, None, batch_size=4, seed=0, extra_fields=["id"])
        batches = pipeline.batches()
        return [name for _ in range(15) for name in next(batches)["id"]]

    there = seen(remote)
    assert sorted(there) == sorted(seen(data)) and there == seen(remote)
    copies = list((tmp_path / "cache" / "copies").iterdir())
    assert len(copies) == 4 and not any("unfinished" in copy.name for copy in copies)


def test_tensorflow_opens_what_fsspec_does_not(tmp_path):
    import tensorflow as tf

    data = corpora.config("webdataset", tmp_path, corpora.examples(20), shards=2)
    for file in (tmp_path / "webdataset").iterdir():
        tf.io.gfile.copy(str(file), f"ram://tars/{file.name}", overwrite=True)
    there = build_source({**data, "path": "ram://tars/*.tar"})
    assert there.column("id").tolist() == build_source(data).column("id").tolist()


def test_copies_are_made_once_and_the_oldest_go(tmp_path, memory, monkeypatch):
    system = fsspec.filesystem("memory")
    for n in range(4):
        system.pipe(f"bucket/data/{n}", bytes([n]) * 1000)
    opened = []
    original = files._Fsspec.open
    monkeypatch.setattr(
        files._Fsspec, "open", lambda self, path: (opened.append(path), original(self, path))[1]
    )
    copies = LocalCopies(tmp_path, capacity=2500)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(copies.get(f"{memory}/0"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1 and len(set(found)) == 1
    for n, time in ((0, 1), (1, 2)):
        os.utime(copies.get(f"{memory}/{n}"), (time, time))
    copies.get(f"{memory}/2")
    assert len(list(tmp_path.iterdir())) == 2
    assert open(copies.get(f"{memory}/0"), "rb").read() == bytes(1000)  # copied again


def test_retries_end_and_lasting_faults_are_not_tried_again(monkeypatch):
    monkeypatch.setattr(files, "FIRST_DELAY", 0.0)
    calls = []

    def fails(error):
        def function():
            calls.append(error)
            raise error

        return function

    with pytest.raises(
        UserError, match=f"x.tar cannot be read, tried {files.ATTEMPTS} times: slow"
    ):
        retrying("x.tar", fails(TimeoutError("slow")))
    assert len(calls) == files.ATTEMPTS
    calls.clear()
    with pytest.raises(UserError, match="x.tar cannot be read: No such file"):
        retrying("x.tar", fails(FileNotFoundError(2, "No such file")))
    with pytest.raises(ZeroDivisionError):
        retrying("x.tar", lambda: 1 // 0)
    assert len(calls) == 1


def test_many_files_are_read_with_few_open(tmp_path):
    opened = OpenFiles(3)
    for n in range(10):
        (tmp_path / str(n)).write_bytes(bytes([n]) * 10)
    before = len(os.listdir("/proc/self/fd"))
    for n in [*range(10), 0, 9]:
        assert opened.read(str(tmp_path / str(n)), 2, 20) == bytes([n]) * 8
    assert len(os.listdir("/proc/self/fd")) <= before + 3


def test_an_index_is_made_once_and_again_when_the_file_changes(tmp_path, monkeypatch):
    from vlp_jax.data.sources import webdataset

    data = corpora.config("webdataset", tmp_path, corpora.examples(30), shards=3)
    made = []
    original = webdataset.index_tar
    monkeypatch.setattr(webdataset, "index_tar", lambda p: (made.append(p), original(p))[1])
    for _ in range(2):
        files.stamp_of.cache_clear()
        assert len(build_source(data)) == 30
    assert len(made) == 3
    with tarfile.open(tmp_path / "webdataset" / "00000.tar", "a") as tar:
        tar.add(__file__, "another.txt")
    files.stamp_of.cache_clear()
    assert len(build_source(data)) == 31 and len(made) == 4


def test_statistics_of_img2dataset_spare_the_walk(tmp_path, memory):
    data = corpora.config("webdataset", tmp_path, corpora.examples(30), shards=3)
    copied_to_memory(tmp_path / "webdataset", memory)
    counts = [len(rows) for rows in corpora.split(corpora.examples(30), 3)]
    for n, count in enumerate(counts):
        stats = f'{{"successes": {count}, "count": {count + 5}}}'.encode()
        fsspec.filesystem("memory").pipe(f"bucket/data/{n:05d}_stats.json", stats)
    source = build_source({**data, "path": f"{memory}/*.tar", "cache_dir": str(tmp_path / "new")})
    assert len(source) == 30
    copied = len(list((tmp_path / "new" / "copies").iterdir()))
    assert copied == 1  # the first, to see which fields there are
    assert sorted(source.column("id")) == [f"id{n:06d}".encode() for n in range(30)]
    assert np.array_equal(np.sort(source.blocks().sizes), np.sort(counts))


def test_a_copy_that_vanishes_is_made_again(tmp_path, memory):
    fsspec.filesystem("memory").pipe("bucket/data/x", b"0123456789")
    copies = LocalCopies(tmp_path, capacity=10**6)
    assert copies.read(f"{memory}/x", 2, 3) == b"234"
    from vlp_jax.data.local_copies import open_files

    open_files().drop()
    os.remove(copies.get(f"{memory}/x"))
    assert copies.read(f"{memory}/x", 8, 5) == b"89"


def test_a_cache_that_cannot_be_written_is_named(tmp_path, memory):
    fsspec.filesystem("memory").pipe("bucket/data/x.tar", b"0" * 512)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="the cache .*file.* cannot be written.*data.cache_dir"):
        LocalCopies(tmp_path / "file", 1).get(f"{memory}/x.tar")


def test_an_index_that_was_cut_off_is_made_again(tmp_path):
    data = corpora.config("tfrecord", tmp_path, corpora.examples(30), shards=2)
    assert len(build_source(data)) == 30
    kept = list((tmp_path / "cache" / "index").glob("*.npz"))
    for file in kept:
        file.write_bytes(file.read_bytes()[:100])
    assert build_source(data).fetch(np.arange(30))["record"][29]
    assert len(kept) == 2


def test_a_passing_fault_while_indexing_loses_nothing(tmp_path, monkeypatch):
    import pyarrow.parquet as pq

    data = corpora.config("parquet", tmp_path, corpora.examples(30), shards=2)
    monkeypatch.setattr(files, "FIRST_DELAY", 0.0)
    original, failures = pq.read_metadata, iter([True, True])

    def flaky(path):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return original(path)

    monkeypatch.setattr(pq, "read_metadata", flaky)
    assert len(build_source(data)) == 30


def test_reading_waits_for_no_download_when_the_process_ends(tmp_path):
    """Downloads ahead of their use must not keep a stopped run alive."""
    import subprocess
    import sys
    import time

    code = f"""
import time, fsspec, numpy as np
from vlp_jax.data.sources.shards import Piece, Shards
fs = fsspec.filesystem("memory")
for n in range(40):
    fs.pipe(f"b/{{n}}.bin", b"x")
pieces = [Piece(f"memory://b/{{n}}.bin", 0, 1) for n in range(40)]
shards = Shards(pieces, "x", None, {str(tmp_path)!r})
original = type(shards.copies)._copy
type(shards.copies)._copy = staticmethod(lambda *a: (time.sleep(5), original(*a)))
shards.will_read(np.arange(40))
print("end", flush=True)
"""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert time.perf_counter() - begin < 30  # of 50 seconds that the copies would take

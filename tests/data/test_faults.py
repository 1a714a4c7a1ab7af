"""Damaged examples: left out, counted by reason, named, replaced; order and resuming stay exact."""

import bz2
import io
import itertools
import logging
import lzma
import shutil
import tarfile

import corpora
import damage
import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import faults, files
from vlp_jax.data.faults import Fault, FaultLog
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import NoScores, UserError

KINDS = ("parquet", "tfrecord", "webdataset")
BATCH = 16


def pipeline(data, **keys):
    return TrainPipeline(
        {"max_bad_fraction": 0.2, **data}, ByteTokenizer(16), batch_size=BATCH, seed=1,
        extra_fields=["id"], **keys,
    )  # fmt: skip


def bad_records(pipe, before=None):
    """(source, reason) -> bad examples of the batches below `before`."""
    bad = pipe.faults.totals(before)["bad"]
    return {(source, r): n for source, reasons in bad.items() for r, n in reasons.items()}


def take(pipe, count, start=0):
    return list(itertools.islice(pipe.batches(start), count))


def ids(batches):
    return np.concatenate([batch["id"] for batch in batches])


QUICK = "webdataset"  # the others are for make test-slow


@pytest.fixture(
    scope="module",
    params=[k if k == QUICK else pytest.param(k, marks=pytest.mark.slow) for k in KINDS],
)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def damaged(kind, tmp_path_factory):
    return damage.write(kind, tmp_path_factory.mktemp("damaged"))


@pytest.fixture(scope="module")
def whole(kind, tmp_path_factory):
    return damage.write(kind, tmp_path_factory.mktemp("whole"), damaged=False)


def test_the_counts_are_the_damage_that_was_done(damaged, kind, caplog):
    pipe = pipeline(damaged)
    epoch = damage.COUNT // BATCH
    with caplog.at_level(logging.WARNING, "vlp_jax.data"):
        take(pipe, epoch)
    assert bad_records(pipe, epoch) == {
        ("data", reason): count for reason, count in damage.counts(kind).items()
    }
    for reason in damage.counts(kind):
        assert f"bad example left out ({reason}): " in caplog.text
    assert "00003" in caplog.text


def test_only_the_places_of_bad_examples_hold_others(damaged, whole, kind):
    epoch = damage.COUNT // BATCH
    with_faults, without = take(pipeline(damaged), epoch), take(pipeline(whole), epoch)
    last = [] if kind == "parquet" else [damage.COUNT - 1]
    bad = {f"id{n:06d}".encode() for n in [*damage.DAMAGED, *last]}
    was = ids(without)
    now = ids(with_faults)
    places = np.array([name in bad for name in was])
    assert places.sum() == sum(damage.counts(kind).values()) and not (set(now) & bad)
    np.testing.assert_array_equal(was[~places], now[~places])
    images = [np.concatenate([b["image"] for b in batches]) for batches in (with_faults, without)]
    np.testing.assert_array_equal(images[0][~places], images[1][~places])
    # What takes a place comes from another batch; beyond the epoch's end it may be any.
    for batch in with_faults[:-2]:
        assert len(set(batch["id"])) == BATCH
        texts = ByteTokenizer(16).decode(batch["text"])
        assert [f"id{int(t.split()[1]):06d}".encode() for t in texts] == batch["id"].tolist()


def test_resuming_with_bad_examples(damaged):
    straight = take(pipeline(damaged), 12)
    for a, b in zip(straight[7:], take(pipeline(damaged), 5, start=7), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


@pytest.mark.slow
def test_processes_with_bad_examples(damaged):
    straight = take(pipeline(damaged), 18)
    parts = [take(pipeline(damaged, process_index=i, process_count=2), 18) for i in range(2)]
    for number, batch in enumerate(straight):
        for name in batch:
            joined = np.concatenate([part[number][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_evaluation_masks_them(damaged, kind):
    pipe = EvalPipeline(
        {**damaged, "max_bad_fraction": 0.2}, None, batch_size=BATCH, extra_fields=["id"]
    )
    seen = [name for batch in pipe.batches() for name in batch["id"][batch["mask"]]]
    counts = damage.counts(kind)
    assert len(seen) == len(set(seen)) == len(pipe) - sum(counts.values())
    assert pipe.faults.totals()["bad"]["data"] == counts


def test_too_many_end_the_run(kind, tmp_path):
    examples = [{**row, "image": b"junk"} for row in corpora.examples(300)]
    data = corpora.config(kind, tmp_path, examples)
    # Whatever is tolerated, there must be some example to train on.
    with pytest.raises(UserError, match="no example can be used: 41 were tried.*undecodable"):
        take(pipeline({**data, "max_bad_fraction": 1.0}), 1)
    some = [
        row if n % 4 else {**row, "image": b"junk"} for n, row in enumerate(corpora.examples(300))
    ]
    data = corpora.config(kind, tmp_path / "some", some)
    with pytest.raises(
        UserError, match="max_bad_fraction=0.1 .*undecodable image in data"
    ) as error:
        take(pipeline({**data, "max_bad_fraction": 0.1}), 100)
    assert "\n" not in str(error.value)


def test_a_folder_goes_on_without_what_its_list_lacks(tmp_path, caplog):
    rows = ["path,caption,kind"]
    for number in range(12):
        if number != 5:
            Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / f"{number}.png")
        caption = "" if number == 3 else f"no {number}"
        rows.append(f"{number}.png,{caption},{'' if number == 8 else number}")
    (tmp_path / "captions.csv").write_text("\n".join(rows))
    preprocess = {"choose_text": {}, "decode_image": {}, "resize": {"size": 4}}
    data = {"source": "folder", "path": str(tmp_path), "split": "all", "label_field": "kind"}
    data |= {"preprocess": preprocess, "max_bad_fraction": 0.3}
    pipe = TrainPipeline(data, ByteTokenizer(16), batch_size=4, seed=1)
    seen = np.concatenate([batch["label"] for batch in take(pipe, 3)])
    assert set(seen) <= set(range(12)) - {3, 5, 8} and len(seen) == 12
    counted = {("data", faults.EMPTY_TEXT): 1, ("data", faults.MISSING_FIELD): 2}
    assert bad_records(pipe, 3) == counted
    for detail in ("line 5: it has no caption", "5.png: there is no such file", "it no 'kind'"):
        assert detail in caplog.text
    evaluation = EvalPipeline(data, ByteTokenizer(16), batch_size=8)
    kept = np.concatenate([batch["label"][batch["mask"]] for batch in evaluation.batches()])
    assert kept.tolist() == [0, 1, 2, 4, 6, 7, 9, 10, 11]


def test_wrong_checksums_and_damaged_row_groups(tmp_path):
    data = corpora.config("tfrecord", tmp_path, corpora.examples(48), shards=1)
    (file,) = (tmp_path / "tfrecord").iterdir()
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    pipe = pipeline(data)
    take(pipe, 3)
    assert bad_records(pipe, 3) == {("data", "unreadable record"): 1}


def test_a_passing_fault_is_read_again(tmp_path, monkeypatch, caplog):
    data = corpora.config("webdataset", tmp_path, corpora.examples(40))
    expected = ids(take(pipeline(data), 5))
    monkeypatch.setattr(files, "FIRST_DELAY", 0.001)
    failures = iter([True, False, True, True] + [False] * 9)
    import os

    pread = os.pread

    def flaky(*arguments):
        if next(failures, False):
            raise OSError(5, "Input/output error")
        return pread(*arguments)

    pipe = pipeline(data)
    monkeypatch.setattr(os, "pread", flaky)
    np.testing.assert_array_equal(ids(take(pipe, 5)), expected)
    assert "Input/output error; trying again" in caplog.text and not bad_records(pipe)
    monkeypatch.setattr(os, "pread", lambda *a: (_ for _ in ()).throw(OSError(5, "Broken disk")))
    with pytest.raises(UserError, match=r"000.*\.tar cannot be read, tried 6 times.*Broken disk"):
        take(pipeline(data), 1)


def test_the_log_counts_by_batch_and_goes_on_from_a_checkpoint():
    log = FaultLog(0.5)
    log.add(0, 10, "a", [Fault("x", "here")])
    log.add(1, 10, "b", [Fault("y", "there"), Fault("x", "there")])
    assert log.totals(before=1) == {"read": 10, "bad": {"a": {"x": 1}}}
    log.add(3, 5, "a", ())
    log.add(2, 5, "b", [Fault("x", "there")])
    assert log.totals(before=3)["read"] == 25
    whole = log.totals()
    assert whole == {"read": 30, "bad": {"a": {"x": 1}, "b": {"x": 2, "y": 1}}}
    again = FaultLog(0.01)
    again.begin_with(20, {("a", "x"): 9})
    again.add(2, 10, "a", [Fault("x", "here")])
    assert again.totals() == {"read": 10, "bad": {"a": {"x": 1}}}
    with pytest.raises(UserError, match="11 of 40 examples"):
        again.add(3, 10, "a", [Fault("x", "here")])


@pytest.mark.parametrize(
    ("read", "bad", "fraction", "fits"),
    [
        (5, 1, 0.1, True),  # one broken image among few ends nothing
        (100, 10, 0.1, True),
        (100, 11, 0.1, False),
        (5, 1, 0.0, False),  # as strict as it was asked for
        (3, 3, 1.0, False),  # nothing is left to score
        (4000, 1000, 0.1, False),
        (0, 0, 0.1, True),
    ],
)
def test_a_split_is_judged_whole_and_alike_on_all_processes(read, bad, fraction, fits):
    # The second of two processes has read nothing that is bad.
    for own in ((bad, read - read // 2), (0, read // 2)):
        log = FaultLog(fraction, of_split=True)
        log.add(0, own[1], "a", [Fault("x", "here")] * own[0])
        seen = []

        def gather(counts, seen=seen):
            seen.append(tuple(counts))
            return [(bad, read - read // 2), (0, read // 2)]

        if fits:
            log.check_all(gather)
        else:
            with pytest.raises(NoScores, match=f"{bad:,} of {read:,} examples"):
                log.check_all(gather)
        assert seen == [own]


def test_the_share_is_of_at_least_a_thousand():
    log = FaultLog(0.01)
    log.add(0, 10, "a", [Fault("x", "here")] * 10)
    with pytest.raises(UserError, match="11 of 20 examples"):
        log.add(1, 10, "a", [Fault("x", "here")])
    with pytest.raises(UserError, match="from 0 to 1"):
        FaultLog(1.5)


def test_what_tensorflow_says_is_told_by_reason():
    assert (
        faults.explain("Feature: caption (data type: string) is required but could not be found.")[
            0
        ]
        == faults.MISSING_FIELD
    )
    assert faults.explain("Could not parse example input, value: 'x'")[0] == faults.UNREADABLE
    assert faults.explain("Unknown image file format. One of JPEG, PNG")[0] == faults.UNDECODABLE
    assert faults.explain("something else")[0] == faults.FAILED


# ----------------------------------------------------------------- shards of which nothing is left

PAGE = b"<html><body>503 Service Unavailable</body></html>" * 100
LOST = {"empty": b"", "a page": PAGE, "cut": None}
ENDS = {
    "webdataset": ".tar",
    "webdataset_gz": ".tar.gz",
    "tfrecord": ".tfrecord",
    "tfrecord_gz": ".tfrecord.gz",
    "array_record": ".array_record",
    "parquet": ".parquet",
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """In every format, 40 examples in four shards of 10; the folder of each."""
    folder = tmp_path_factory.mktemp("lost")
    rows = [{**row, "image": b"image"} for row in corpora.examples(40)]
    parts = [rows[n : n + 10] for n in range(0, 40, 10)]
    for kind in ENDS:
        corpora.WRITERS[kind](folder / kind, parts)
    return folder


@pytest.mark.parametrize("lost", LOST)
@pytest.mark.parametrize("kind", ENDS)
def test_a_lost_shard_counts_as_many_bad_examples_as_others_hold(
    shards, tmp_path, kind, lost, caplog
):
    folder = tmp_path / kind
    shutil.copytree(shards / kind, folder)
    file = folder / f"00002{ENDS[kind]}"
    # 15 bytes are less than any header.
    file.write_bytes(file.read_bytes()[:15] if LOST[lost] is None else LOST[lost])
    data = {"source": kind.removesuffix("_gz"), "path": str(folder)}
    data["cache_dir"] = str(tmp_path / "cache")
    with caplog.at_level(logging.WARNING, "vlp_jax.data"):
        source = build_source(data)
    assert str(file) in caplog.text
    if kind.startswith("tfrecord") and lost == "empty":
        # TensorFlow reads an empty file as one without records, as its own writer writes it.
        assert len(source) == 30 and "1 of 4 files hold no example" in caplog.text
        return
    found = source.fetch(np.arange(len(source)))[faults.FAULT]
    assert len(source) == 40 and [bool(fault) for fault in found] == [
        20 <= n < 30 for n in range(40)
    ]
    assert all(b"truncated shard" in fault for fault in found[20:30])
    again = build_source(data)  # with what the cache keeps of the others
    assert len(again) == 40 and again.fingerprint() == source.fingerprint()
    said = {"empty": "empty (0 bytes)", "a page": "a page of HTML", "cut": ""}[lost]
    assert said in caplog.text and said.encode() in found[25]
    assert "what they lack of 10 examples" in caplog.text
    # The file is mended: all is well again.
    file.write_bytes((shards / kind / file.name).read_bytes())
    files.stamp_of.cache_clear()
    assert not any(build_source(data).fetch(np.arange(40))[faults.FAULT])


@pytest.mark.parametrize("kind", sorted({*ENDS} - {"parquet"}))
def test_the_part_of_a_shard_that_is_cut_off_counts(shards, tmp_path, kind):
    folder = tmp_path / kind
    shutil.copytree(shards / kind, folder)
    file = folder / f"00001{ENDS[kind]}"
    content = file.read_bytes()
    middle = len(content) // 2 - 7
    # Wherever a gzip stream is cut: what comes out of it may end within a record or between two.
    for size in range(1, len(content), 2) if kind == "tfrecord_gz" else [middle]:
        file.write_bytes(content[:size])
        files.stamp_of.cache_clear()
        data = {"source": kind.removesuffix("_gz"), "path": str(folder)}
        source = build_source({**data, "cache_dir": str(tmp_path / f"cache{size}")})
        bad = [bool(f) for f in source.fetch(np.arange(len(source)))[faults.FAULT]]
        assert len(source) == 40 and not any(bad[:10] + bad[20:]), size
        # All of the file may have come out, but for the checksum at its end.
        first = bad.index(True) if any(bad) else 20
        assert sum(bad) == 20 - first and (first < 20 or size > len(content) - 30), size
    # What comes before the cut is read; an ArrayRecord file has its index at its end.
    assert kind.endswith("_gz") or bad[10] == (kind == "array_record")


def test_a_tar_that_is_cut_between_two_files_is_seen_beside_others_with_ends(
    shards, tmp_path, caplog
):
    folder = tmp_path / "tars"
    shutil.copytree(shards / "webdataset", folder)
    data = {"source": "webdataset", "path": str(folder), "cache_dir": str(tmp_path / "cache")}
    sample = 3 * 1024
    for number in (1, 0, 2, 3):
        file = folder / f"0000{number}.tar"
        file.write_bytes(file.read_bytes()[: (7 if number == 1 else 10) * sample])
        files.stamp_of.cache_clear()
        caplog.clear()
        with caplog.at_level(logging.WARNING, "vlp_jax.data"):
            source = build_source(data)
        if number != 3:
            assert len(source) == 40 and "cannot be read to their end" in caplog.text
            found = source.fetch(np.arange(40))[faults.FAULT]
            assert np.flatnonzero([bool(f) for f in found]).tolist() == [17, 18, 19]
    # Where no file has an end, its writer makes none.
    assert len(source) == 37 and not caplog.text


def test_lost_shards_end_a_run(shards, tmp_path):
    shutil.copytree(shards / "webdataset", tmp_path / "tars")
    for number in (2, 3):
        (tmp_path / "tars" / f"0000{number}.tar").write_bytes(PAGE)
    data = {"source": "webdataset", "path": str(tmp_path / "tars"), "preprocess": TEXT_ONLY}
    data["cache_dir"] = str(tmp_path / "cache")
    evaluation = EvalPipeline(data, None, batch_size=8, extra_fields=["text_raw"])
    with pytest.raises(UserError, match="20 of 40 .*20 truncated shard.*last: .*00003.tar: .*HTML"):
        list(evaluation.batches())
    for number in (0, 1):
        (tmp_path / "tars" / f"0000{number}.tar").write_bytes(b"")
    files.stamp_of.cache_clear()
    with pytest.raises(UserError, match="none of 4 files can be read: .*00000.tar is empty"):
        build_source(data)


@pytest.mark.parametrize(
    "pack, said",
    [
        (bz2.compress, "compressed by bzip2.*bunzip2 .*x.tar"),
        (lzma.compress, "compressed by xz.*unxz .*x.tar"),
        (lambda raw: b"\x28\xb5\x2f\xfd" + raw, "compressed by Zstandard.*unzstd .*x.tar"),
        (lambda raw: b"version https://git-lfs.github.com/spec/v1", "Git LFS.*git lfs pull"),
        (lambda raw: b"PK\x03\x04" + raw, "zip archive.*unzip"),
    ],
    ids=["bzip2", "xz", "zstd", "lfs", "zip"],
)
def test_what_a_shard_is_instead_is_told_whatever_its_name(shards, tmp_path, pack, said):
    tar = (shards / "webdataset" / "00000.tar").read_bytes()
    for name in ("x.tar", "y.tar.gz"):
        (tmp_path / name).write_bytes(pack(tar))
        data = {"source": "webdataset", "path": str(tmp_path / name)}
        with pytest.raises(UserError, match=said.replace("x.tar", name)):
            build_source({**data, "cache_dir": str(tmp_path / "cache")})


# ----------------------------------------------------------------------------- text that is no text

TEXT_ONLY = {"keep": {"fields": ("text",)}}
CAFE = "a dog, caf\u00e9"
TEXTS = {  # bytes -> the caption, or None for a bad example
    "a mark of UTF-8": (CAFE.encode("utf-8-sig"), CAFE),
    "other scripts": ("\u4e2d\u6587 \U0001f600".encode(), "\u4e2d\u6587 \U0001f600"),
    "latin-1": (CAFE.encode("latin-1"), None),
    "utf-16": (CAFE.encode("utf-16"), None),
    "utf-16 without mark": ("a dog".encode("utf-16-le"), None),
    "utf-16 big endian": ("a dog".encode("utf-16-be"), None),
    "half a surrogate pair": (b"\xed\xa0\xbd dog", None),
    "shift-jis": ("\u72ac".encode("shift-jis"), None),
}


@pytest.mark.parametrize("kind", ["webdataset", "tfrecord", "parquet"])
def test_text_that_is_not_utf_8_is_a_bad_example(tmp_path, kind):
    rows = [{"id": f"{n}", "image": b"", "text": raw} for n, (raw, _) in enumerate(TEXTS.values())]
    folder = tmp_path / kind
    folder.mkdir()
    if kind == "webdataset":
        with tarfile.open(folder / "0.tar", "w") as tar:
            for row in rows:
                info = tarfile.TarInfo(f"{row['id']}.txt")
                info.size = len(row["text"])
                tar.addfile(info, io.BytesIO(row["text"]))
    elif kind == "tfrecord":
        corpora.write_tfrecords(folder, [rows])
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table({"text": [row["text"] for row in rows]}), folder / "0.parquet")
    data = {"source": kind, "path": str(folder), "cache_dir": str(tmp_path / "cache")}
    data |= {"preprocess": {**TEXT_ONLY, "lowercase": {}}, "max_bad_fraction": 1.0}
    pipe = EvalPipeline(data, None, batch_size=len(rows), extra_fields=["text_raw"])
    (batch,) = pipe.batches()
    expected = [text for _, text in TEXTS.values() if text is not None]
    assert [text.decode() for text in batch["text_raw"][batch["mask"]]] == expected
    assert pipe.faults.totals()["bad"] == {"data": {"malformed text": len(rows) - len(expected)}}


def test_json_of_tars_is_read_in_every_encoding_of_unicode(tmp_path):
    encodings = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"]
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for encoding in encodings:
            note = f'{{"caption": "{CAFE}"}}'.encode(encoding)
            info = tarfile.TarInfo(f"{encoding}.json")
            info.size = len(note)
            tar.addfile(info, io.BytesIO(note))
        broken = tarfile.TarInfo("broken.json")
        broken.size = 1
        tar.addfile(broken, io.BytesIO(b"{"))
    data = {"source": "webdataset", "path": str(tmp_path), "fields": {"text": "json.caption"}}
    source = build_source({**data, "cache_dir": str(tmp_path / "cache")})
    record = source.fetch(np.arange(7))
    assert record["json.caption"][:5].tolist() == [CAFE.encode()] * 5
    assert b"malformed text" in record[faults.FAULT][5] and not any(record[faults.FAULT][:5])
    assert b"unreadable record" in record[faults.FAULT][6]


def test_several_captions_need_choose_text(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": [["a", "b"]], "more": ["c"]}), tmp_path / "x.parquet")
    data = {"source": "parquet", "path": str(tmp_path / "x.parquet")}
    with pytest.raises(UserError, match='\'text\' is a list.*"choose_text": {"field": "text"}'):
        TrainPipeline(data, ByteTokenizer(16), batch_size=1, seed=0)
    chosen = {**data, "preprocess": {"choose_text": {"field": "text", "index": 1}}}
    batch = next(TrainPipeline(chosen, ByteTokenizer(16), batch_size=1, seed=0).batches())
    assert ByteTokenizer(16).decode(batch["text"]) == ["b"]


def test_features_that_only_later_records_have_can_be_named(tmp_path):
    rows = [{"id": f"{n}", "image": b"", "text": None} for n in range(25)]
    rows += [{"id": f"{n}", "image": b"", "text": "late"} for n in range(25, 30)]
    data = corpora.write_tfrecords(tmp_path / "tfrecord", [rows])
    data |= {"cache_dir": str(tmp_path / "cache"), "max_bad_fraction": 1.0}
    assert "text" not in build_source(data).fields()
    data["fields"] = {"text": "caption"}
    pipe = EvalPipeline(data, None, batch_size=30, extra_fields=["text_raw"])
    (batch,) = pipe.batches()
    assert batch["mask"].tolist() == [n >= 25 for n in range(30)]
    assert pipe.faults.totals()["bad"] == {"data": {"missing field": 25}}
    with pytest.raises(UserError, match="'captoin' in the 30 records.*data.features"):
        build_source({**data, "fields": {"text": "captoin"}})

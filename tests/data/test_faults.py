"""Damaged examples: left out, counted by reason, named, replaced; order and resuming stay exact."""

import itertools
import logging

import corpora
import damage
import numpy as np
import pytest
from PIL import Image

from vlp_jax.data import faults, files
from vlp_jax.data.fault_log import Fault, FaultLog
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import NoScores, UserError

KINDS = ("parquet", "tfrecord", "webdataset")
BATCH = 16


def pipeline(data, **keys):
    return TrainPipeline(
        {"max_bad_fraction": 0.2, **data}, ByteTokenizer(16), batch_size=BATCH, seed=1,
        extra_fields=["id"], **keys,
    )  # fmt: skip


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


def test_the_counts_are_the_damage_that_was_done(damaged, caplog):
    pipe = pipeline(damaged)
    epoch = damage.COUNT // BATCH
    with caplog.at_level(logging.WARNING, "vlp_jax.data"):
        take(pipe, epoch)
    assert pipe.bad_records(before=epoch) == {
        ("data", reason): count for reason, count in damage.COUNTS.items()
    }
    for reason in damage.COUNTS:
        assert f"bad example left out ({reason}): " in caplog.text
    assert "00003" in caplog.text or "00004" in caplog.text


def test_only_the_places_of_bad_examples_hold_others(damaged, whole, kind):
    if kind == "parquet":
        pytest.skip("a Parquet file that is cut loses all its rows, so that the order is another")
    epoch = damage.COUNT // BATCH
    with_faults, without = take(pipeline(damaged), epoch), take(pipeline(whole), epoch)
    bad = {f"id{n:06d}".encode() for n in [*damage.DAMAGED, damage.COUNT - 1]}
    was = ids(without)
    now = ids(with_faults)
    places = np.array([name in bad for name in was])
    assert places.sum() == 12 and not (set(now) & bad)
    np.testing.assert_array_equal(was[~places], now[~places])
    images = [np.concatenate([b["image"] for b in batches]) for batches in (with_faults, without)]
    np.testing.assert_array_equal(images[0][~places], images[1][~places])
    # What takes a place comes from another batch; beyond the epoch's end it may be any.
    for batch in with_faults[:-2]:
        assert len(set(batch["id"])) == BATCH
        texts = ByteTokenizer(16).decode(batch["text"])
        assert [f"id{int(t.split()[1]):06d}".encode() for t in texts] == batch["id"].tolist()


def test_resuming_and_processes_with_bad_examples(damaged):
    straight = take(pipeline(damaged), 18)
    for a, b in zip(straight[7:], take(pipeline(damaged), 11, start=7), strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])
    parts = [take(pipeline(damaged, process_index=i, process_count=2), 18) for i in range(2)]
    for number, batch in enumerate(straight):
        for name in batch:
            joined = np.concatenate([part[number][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])


def test_evaluation_masks_them(damaged):
    pipe = EvalPipeline(
        {**damaged, "max_bad_fraction": 0.2}, None, batch_size=BATCH, extra_fields=["id"]
    )
    seen = [name for batch in pipe.batches() for name in batch["id"][batch["mask"]]]
    assert len(seen) == len(set(seen)) == len(pipe) - 12
    assert pipe.faults.totals()["bad"]["data"] == damage.COUNTS


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
    assert pipe.bad_records(before=3) == counted
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
    assert pipe.bad_records(before=3) == {("data", "unreadable record"): 1}


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
    assert "Input/output error; trying again" in caplog.text and not pipe.bad_records()
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

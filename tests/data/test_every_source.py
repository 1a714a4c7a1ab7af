"""What holds for every source: fields, order, processes, resuming."""

import itertools
import os

import corpora
import numpy as np
import pytest

from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.sources import build_source
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import UserError

COUNT, BATCH = 101, 8
ROWS = corpora.examples(COUNT)
IDS = {row["id"]: number for number, row in enumerate(ROWS)}


QUICK = {"arrays", "webdataset"}  # others: make test-slow
KINDS = [
    kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow)
    for kind in sorted(corpora.WRITERS)
]


@pytest.fixture(scope="module", params=KINDS)
def data(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return corpora.config(request.param, folder, ROWS, lanes=4, window=2)


@pytest.fixture(scope="module")
def straight(data):
    """The batches of two epochs by one process."""
    return take(pipeline(data), 2 * COUNT // BATCH + 1)


def pipeline(data, batch_size=BATCH, **keys):
    keys.setdefault("seed", 3)
    return TrainPipeline(
        data, ByteTokenizer(16), batch_size=batch_size, extra_fields=["id"], **keys
    )


def take(pipeline, count, start=0):
    return list(itertools.islice(pipeline.batches(start), count))


def by_position(batches, lanes):
    """The same batches with their rows in the order of the stream: a lane's lie together."""

    def sort(rows):
        return rows.reshape(lanes, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    return [{name: sort(rows) for name, rows in batch.items()} for batch in batches]


def numbers(batches):
    """Which rows batches hold."""
    ids = [name.decode().removesuffix(".jpg") for batch in batches for name in batch["id"]]
    return [IDS[name] for name in ids]


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_every_example_comes_once_an_epoch_with_what_is_its_own(data, straight):
    batches = by_position(straight, pipeline(data).lanes)
    seen = numbers(batches)
    assert sorted(seen[:COUNT]) == sorted(seen[COUNT : 2 * COUNT]) == list(range(COUNT))
    assert seen[:COUNT] != seen[COUNT : 2 * COUNT] and seen[:COUNT] != sorted(seen[:COUNT])
    texts = ByteTokenizer(16).decode(np.concatenate([batch["text"] for batch in batches]))
    assert texts == [f"Number {n}" for n in seen]
    assert np.concatenate([batch["label"] for batch in batches]).tolist() == [n % 3 for n in seen]
    # Of the pixels: equal for one example wherever it stands, and different for two.
    images = np.concatenate([batch["image"] for batch in batches])
    first = {n: images[place] for place, n in enumerate(seen[:COUNT])}
    assert all(np.array_equal(images[COUNT + p], first[n]) for p, n in enumerate(seen[COUNT:]))
    assert len({image.tobytes() for image in first.values()}) == COUNT


def test_images_are_the_bytes_that_were_written(data):
    source = build_source(data)
    if not source.needs_tensorflow:
        images = source.column("image")
    else:
        import tensorflow as tf

        records = source.fetch(np.arange(COUNT))
        records = {k: tf.constant(v) for k, v in records.items()}
        images = [
            source.parse({k: v[n] for k, v in records.items()}, ["image"])["image"].numpy()
            for n in range(COUNT)
        ]
    assert [bytes(image) for image in images] == [row["image"] for row in ROWS]


# That the plan is the same for 1, 2, 4 and 8 is shown without reading in test_block_order.
@pytest.mark.parametrize(
    "processes",
    [2, *(pytest.param(count, marks=pytest.mark.slow) for count in (4, 8))],
)
def test_the_global_batches_do_not_depend_on_the_processes(data, straight, processes):
    parts = [
        take(pipeline(data, process_index=i, process_count=processes), 12, start=3)
        for i in range(processes)
    ]
    for number, batch in enumerate(straight[3:15]):
        joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batch}
        assert_same(batch, joined)


# An epoch ends within batch 12.
@pytest.mark.parametrize("step", [12, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 17))])
def test_resuming_is_exact(data, straight, step):
    for a, b in zip(straight[step:], take(pipeline(data), 3, start=step), strict=False):
        assert_same(a, b)
    assert numbers(take(pipeline(data, seed=4), 5)) != numbers(straight[:5])


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_evaluation_is_in_order_and_each_once(data, processes):
    seen = []
    for index in range(processes):
        share = {"batch_size": BATCH, "process_index": index, "process_count": processes}
        batches = EvalPipeline(data, None, **share, extra_fields=["id"]).batches()
        seen.append([numbers([{"id": b["id"][b["mask"]]}]) for b in batches])
    merged = [n for parts in zip(*seen, strict=True) for part in parts for n in part]
    assert merged == list(range(COUNT))


def test_where_and_limit(data):
    some = {**data, "where": {"label": 1}, "limit": 20}
    seen = numbers(take(pipeline(some, batch_size=4), 5))
    assert sorted(seen) == [n for n in range(COUNT) if n % 3 == 1][:20]


def test_the_fingerprint_is_that_of_the_data(data, tmp_path):
    same = build_source(data).fingerprint()
    assert same == build_source(dict(data)).fingerprint()
    assert same != build_source({**data, "limit": 50}).fingerprint()


def test_a_process_reads_few_blocks(tmp_path, monkeypatch):
    """With as many processes as lanes, each reads about its part of the files, not all of them."""
    data = corpora.config("parquet", tmp_path, corpora.examples(1600), shards=4, lanes=4, window=1)
    read = set()
    from vlp_jax.data.sources import parquet

    get = parquet._RowGroups.get
    monkeypatch.setattr(
        parquet._RowGroups, "get", lambda self, key, f: (read.add(key), get(self, key, f))[1]
    )
    one = pipeline(data, process_index=1, process_count=4)
    take(one, 1600 // BATCH)
    groups = len(build_source(data).blocks().sizes)
    assert os.path.exists(tmp_path / "parquet") and groups >= 228
    assert len(read) < 0.75 * groups  # its quarter, and what threads have read ahead


def test_pairs_are_mixed_within_a_batch_whatever_the_processes(tmp_path):
    data = corpora.config("tfrecord", tmp_path, ROWS, lanes=2)
    mixed = {**data, "batch_ops": {"mixup": {"alpha": 0.4, "num_classes": 3}}}
    plain, blended = take(pipeline(data), 3), take(pipeline(mixed), 3)
    spec = pipeline(mixed).batch_spec()
    assert spec["label"] == ((BATCH, 3), np.dtype(np.float32))
    for before, after in zip(plain, blended, strict=True):
        for first in range(0, BATCH, 2):
            a, b = before["image"][first : first + 2].astype(float)
            # The share that the labels tell is the share of the pixels.
            own = before["label"][first]
            other = before["label"][first + 1]
            if own != other:
                share = after["label"][first, own]
                np.testing.assert_allclose(
                    after["image"][first], share * a + (1 - share) * b, atol=1.01
                )
        np.testing.assert_allclose(after["label"].sum(axis=1), 1, atol=1e-6)
    parts = [take(pipeline(mixed, process_index=i, process_count=2), 3) for i in range(2)]
    for number, batch in enumerate(blended):
        for name in batch:
            joined = np.concatenate([part[number][name] for part in parts])
            np.testing.assert_array_equal(joined, batch[name])
    with pytest.raises(UserError, match="an even number"):
        pipeline(mixed, process_count=8)
    with pytest.raises(UserError, match="did you mean 'mixup'"):
        pipeline({**data, "batch_ops": {"mixxup": {}}})

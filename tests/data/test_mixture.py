"""Weighted mixtures: exact shares, one order for all processes, every source on its own terms."""

import itertools

import corpora
import numpy as np
import pytest

from vlp_jax.data.batch_reader import Mixture
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import UserError

BATCH = 16


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    tars = corpora.config("webdataset", folder, corpora.examples(60), lanes=4)
    table = corpora.config("parquet", folder, corpora.examples(40, first=1000), lanes=8)
    files = corpora.config("folder", folder, corpora.examples(25, first=2000))
    ops = {**files["preprocess"], "lowercase": {}}
    return {
        "tars": {**tars, "weight": 5},
        "table": {**table, "weight": 2.0},
        "files": {**files, "preprocess": ops, "weight": 1},
    }


def pipeline(parts, batch_size=BATCH, seed=0, **keys):
    keys = {"batch_size": batch_size, "seed": seed, "extra_fields": ["text_raw"], **keys}
    return TrainPipeline({"source": "mixture", "parts": parts}, ByteTokenizer(16), **keys)


def take(pipe, count, start=0):
    return list(itertools.islice(pipe.batches(start), count))


def numbers(batch):
    return np.array([int(text.split()[1]) for text in batch["text_raw"]])


@pytest.fixture(scope="module")
def batches(parts):
    return take(pipeline(parts), 60)


def test_shares_are_exact_and_each_source_is_read_whole(parts, batches):
    sources = np.array([numbers(batch) // 1000 for batch in batches])
    # Five, two and one of eight, in every batch to a few and over all of them to one a lane.
    for source, share in enumerate((5 / 8, 2 / 8, 1 / 8)):
        in_batch = (sources == source).sum(axis=1)
        assert abs(in_batch - share * BATCH).max() <= 3
        so_far = np.cumsum(in_batch) - share * BATCH * np.arange(1, 61)
        assert abs(so_far).max() <= 8
    assert pipeline(parts).lanes == 8
    seen = np.concatenate([numbers(batch) for batch in batches])
    for source, size in enumerate((60, 40, 25)):
        counts = np.bincount(seen[seen // 1000 == source] % 1000, minlength=size)
        # 600, 240 and 120 examples: as many epochs of each, to one.
        assert counts.max() - counts.min() <= 1 and len(counts) == size


def test_every_source_has_its_own_preprocessing(batches):
    for batch in batches[:5]:
        for number, text in zip(numbers(batch), batch["text_raw"], strict=True):
            assert text.startswith(b"number" if number >= 2000 else b"Number")


@pytest.mark.slow
def test_one_order_for_all_processes_and_resuming(parts):
    whole = take(pipeline(parts), 12)
    split = [take(pipeline(parts, process_index=i, process_count=4), 8, start=4) for i in range(4)]
    for number, batch in enumerate(whole[4:]):
        for name in batch:
            joined = np.concatenate([part[number][name] for part in split])
            np.testing.assert_array_equal(joined, batch[name], err_msg=name)
    other = take(pipeline(parts, seed=1), 1)[0]
    assert numbers(other).tolist() != numbers(whole[0]).tolist()


def test_weight_zero_leaves_a_part_out_and_length_is_the_sum(parts):
    two = {**parts, "table": {**parts["table"], "weight": 0}}
    pipe = pipeline(two)
    assert len(pipe) == 85 and pipe.source_names == ("tars", "files")
    assert not any((numbers(batch) // 1000 == 1).any() for batch in take(pipe, 6))


def test_a_tokenizer_is_trained_on_all_parts(parts):
    texts = list(sample_texts({"source": "mixture", "parts": parts}, limit=80))
    origin = [int(text.split()[1]) // 1000 for text in texts]
    assert [origin.count(n) for n in range(3)] == [50, 20, 10]


def test_a_tiny_weight_takes_little():
    source, _ = Mixture.of_weights([1e-12, 1, 1e-12], 1).assign(
        np.arange(1000), np.zeros(1000, int)
    )
    assert (source == 1).sum() >= 999


@pytest.mark.parametrize("weights", [(3, 1), (0.7, 0.3), (1, 1e-6), (1, 2, 3, 4, 5), (0.1,) * 7])
def test_no_lane_ever_strays_from_its_shares(weights):
    mixture = Mixture.of_weights(weights, lanes=4)
    shares = np.array(weights) / sum(weights)
    for lane in range(4):
        for begin in (0, 10**12):
            rows = np.arange(begin, begin + 3000)
            source, own = mixture.assign(rows, np.full(3000, lane))
            for number, share in enumerate(shares):
                mine = own[source == number]
                assert (np.diff(mine) == 1).all()  # each row of a source once, in order
                if mine.size:
                    assert abs(mine[0] - share * rows[source == number][0]) < len(weights) * (
                        1 + begin * 1e-9
                    )


def refuses(parts, message):
    with pytest.raises(UserError, match=message) as error:
        pipeline(parts)
    assert "\n" not in str(error.value)


def test_mistakes(parts, tmp_path):
    def weights(*values):
        return {n: {**p, "weight": w} for (n, p), w in zip(parts.items(), values, strict=True)}

    refuses(weights(1, -1, 1), "data.parts.table.weight=-1 must be 0 or more")
    refuses(weights(0, 0, 0), r"no part has a weight above 0 \(tars, table, files\)")
    refuses(weights(1, "a", 1), "data.parts.table.weight='a' must be a number")
    refuses({}, "no part has a weight above 0")
    nowhere = {**parts["tars"], "path": str(tmp_path / "*.tar")}
    refuses({**parts, "tars": nowhere}, "data.parts.tars: data.path=.* matches no file")
    (tmp_path / "empty.tar").write_bytes(b"\0" * 10240)
    nothing = {**parts["tars"], "path": str(tmp_path / "empty.tar")}
    refuses({**parts, "tars": nothing}, "data.parts.tars: .*hold no example")
    small = {**parts["table"], "preprocess": {"decode_image": {}, "resize": {"size": 8}}}
    refuses({**parts, "table": small}, "must give the same fields: tars gives .*table gives ")
    with pytest.raises(UserError, match="a mixture cannot be evaluated"):
        EvalPipeline({"source": "mixture", "parts": parts}, None, batch_size=4)
    with pytest.raises(UserError, match="unknown key 'limit' in data"):
        TrainPipeline({"source": "mixture", "parts": parts, "limit": 3}, None, batch_size=4, seed=0)

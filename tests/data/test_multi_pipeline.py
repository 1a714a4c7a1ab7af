"""Several datasets side by side: names of fields, orders, sizes, resuming, mistakes."""

import itertools

import numpy as np
import pytest

from vlp_jax.data.pipeline import MultiPipeline, TrainPipeline
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import UserError

N, BATCH = 24, 8


def arrays(count=N, size=4, **more):
    places = np.arange(count)
    image = places.astype(np.uint8)[:, None, None, None] * np.ones((1, size, size, 3), np.uint8)
    return {"source": "arrays", "arrays": {"image": image, "place": places, **more}}


def joined(extra, seed=0, **layout):
    tokenizer = ByteTokenizer(12)
    return MultiPipeline(arrays(), extra, tokenizer, seed=seed, batch_size=BATCH, **layout)


def take(pipeline, count, start=0):
    return list(itertools.islice(pipeline.batches(start), count))


def places(batches, name="place"):
    return np.concatenate([batch[name] for batch in batches]).tolist()


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_fields_carry_the_name_of_their_dataset_and_its_sizes():
    words = [f"text {n}" for n in range(10)]
    pipeline = joined({"wide": arrays(10, size=6, text=words), "other": arrays()})
    spec = pipeline.batch_spec()
    assert {name: shape for name, (shape, _) in spec.items()} == {
        "image": (BATCH, 4, 4, 3),
        "place": (BATCH,),
        "wide/image": (BATCH, 6, 6, 3),
        "wide/place": (BATCH,),
        "wide/text": (BATCH, 12),
        "other/image": (BATCH, 4, 4, 3),
        "other/place": (BATCH,),
    }
    for batch in take(pipeline, 4):
        assert {name: (array.shape, array.dtype) for name, array in batch.items()} == spec
        for prefix in ("", "wide/", "other/"):  # what belongs together stays together
            image, place = batch[f"{prefix}image"], batch[f"{prefix}place"]
            np.testing.assert_array_equal(image[:, 0, 0, 0], place)
        texts = ByteTokenizer(12).decode(batch["wide/text"])
        assert texts == [f"text {n}" for n in batch["wide/place"]]


def test_each_dataset_has_its_own_order_and_its_own_epochs():
    pipeline = joined({"a": arrays(), "b": arrays(), "small": arrays(4)})
    assert len(pipeline) == N
    epoch = take(pipeline, N // BATCH)
    orders = [places(epoch, name) for name in ("place", "a/place", "b/place")]
    for order in orders:
        assert sorted(order) == list(range(N))
    assert len({tuple(order) for order in orders}) == 3
    small = np.reshape(places(epoch, "small/place"), (-1, 4))  # an epoch of it is half a batch
    np.testing.assert_array_equal(np.sort(small, axis=1), np.tile(np.arange(4), (6, 1)))


def test_a_further_dataset_leaves_the_order_of_the_others_alone():
    alone = take(TrainPipeline(arrays(), None, batch_size=BATCH, seed=3), 4)
    one, two = (take(joined(extra, seed=3), 4) for extra in (
        {"a": arrays()}, {"b": arrays(5), "a": arrays()},
    ))  # fmt: skip
    for first, second, third in zip(alone, one, two, strict=True):
        assert_same(first, {name: second[name] for name in first})
        assert_same(second, {name: third[name] for name in second})
    other = take(joined({"a": arrays()}, seed=4), 4)
    for name in ("place", "a/place"):
        assert places(one, name) != places(other, name)


@pytest.mark.parametrize("step", [1, 3, 10])
def test_resuming_is_exact_for_all_datasets(step):
    extra = {"small": arrays(5), "other": arrays()}
    straight = take(joined(extra), step + 3)[step:]
    for expected, batch in zip(straight, take(joined(extra), 3, start=step), strict=True):
        assert_same(expected, batch)


def test_processes_share_the_batches_of_every_dataset():
    extra = {"other": arrays(10)}
    parts = [take(joined(extra, process_index=i, process_count=2), 3, start=2) for i in range(2)]
    for number, whole in enumerate(take(joined(extra), 3, start=2)):
        together = {n: np.concatenate([part[number][n] for part in parts]) for n in whole}
        assert_same(whole, together)


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"source": "arays", "arrays": {}}, "config.extra_data.more: .*did you mean 'arrays'"),
        ({**arrays(), "split": "x"}, "config.extra_data.more: .*unknown key 'split'"),
        (
            {**arrays(), "preprocess": {"resise": {"size": 4}}},
            "config.extra_data.more: .*did you mean 'resize'",
        ),
    ],
)
def test_a_mistake_is_said_to_be_in_its_dataset(extra, words):
    with pytest.raises(UserError, match=words):
        joined({"more": extra})

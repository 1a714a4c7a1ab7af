"""The pipeline: what batches hold, determinism, resuming, processes, evaluation, no TensorFlow."""

import io
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from vlp_jax.data.pipeline import BatchShare, EvalPipeline, TrainPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import ByteTokenizer
from vlp_jax.errors import UserError

SIZE = 16
TRAIN_OPS = {
    "choose_text": {},
    "decode_image": {},
    "random_resized_crop": {"size": SIZE, "min_scale": 0.3},
    "flip_left_right": {},
}
EVAL_OPS = {"choose_text": {"index": 0}, "decode_image": {}, "resize": {"size": SIZE}}


def jpeg(number):
    noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(noise).resize((40, 30)).save(stream, "jpeg")
    return stream.getvalue()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    lines = ["path,caption,label"]
    for number in range(53):
        (root / f"{number}.jpg").write_bytes(jpeg(number))
        lines.append(f"{number}.jpg,Number {number},c{number % 3}")
        if number % 2:
            lines.append(f"{number}.jpg,Also {number},c{number % 3}")
    (root / "captions.csv").write_text("\n".join(lines))
    return root


def config(photos, ops=TRAIN_OPS, **keys):
    return {"source": "folder", "path": str(photos), "split": "all", "label_field": "label",
            "preprocess": ops, **keys}  # fmt: skip


def take(pipeline, count, start=0):
    return list(itertools.islice(pipeline.batches(start), count))


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def train(photos, tokenizer=None, batch_size=8, seed=0, **keys):
    tokenizer = tokenizer or ByteTokenizer(16)
    return TrainPipeline(config(photos), tokenizer, batch_size=batch_size, seed=seed, **keys)


def numbers_of(texts):
    return [int(text.split()[1]) for text in texts]


def test_batches_hold_what_batch_spec_says(photos):
    pipeline = train(photos)
    spec = pipeline.batch_spec()
    assert spec == {
        "image": ((8, SIZE, SIZE, 3), np.dtype(np.uint8)),
        "label": ((8,), np.dtype(np.int64)),
        "text": ((8, 16), np.dtype(np.int32)),
    }
    for batch in take(pipeline, 3):
        assert {name: (a.shape, a.dtype) for name, a in batch.items()} == spec
    assert pipeline.class_names("label") == ("c0", "c1", "c2") and len(pipeline) == 53


def test_every_example_once_per_epoch_with_its_own_label_and_image(photos):
    tokenizer = ByteTokenizer(16)
    batches = take(train(photos, tokenizer, batch_size=53), 2)
    for batch in batches:
        numbers = numbers_of(tokenizer.decode(batch["text"]))
        assert sorted(numbers) == list(range(53))
        assert batch["label"].tolist() == [number % 3 for number in numbers]
    first, second = (numbers_of(tokenizer.decode(batch["text"])) for batch in batches)
    assert first != second
    texts = {text for batch in batches for text in tokenizer.decode(batch["text"])}
    assert any(text.startswith("Also") for text in texts)
    # Epochs differ in augmentation too: the same example, another crop.
    image = {number: batches[0]["image"][place] for place, number in enumerate(first)}
    same = [np.array_equal(image[n], batches[1]["image"][p]) for p, n in enumerate(second)]
    assert not any(same)


def test_deterministic_and_seeded(photos):
    first, again, other = (take(train(photos, seed=seed), 4) for seed in (1, 1, 2))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)
    assert not np.array_equal(first[0]["text"], other[0]["text"])


@pytest.fixture(scope="module")
def straight(photos):
    """The first 23 batches, by one process."""
    return take(train(photos), 23)


@pytest.mark.parametrize(  # an epoch ends within batch 6
    "step", [6, *(pytest.param(step, marks=pytest.mark.slow) for step in (1, 7, 20))]
)
def test_resuming_is_exact(photos, straight, step):
    resumed = take(train(photos), 3, start=step)
    for a, b in zip(straight[step : step + 3], resumed, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("processes", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_the_examples_of_a_batch_are_named_without_reading_them(photos, processes):
    parts = [
        train(photos, process_index=index, process_count=processes) for index in range(processes)
    ]
    batches = [take(part, 12) for part in parts]
    for number in (0, 7, 11):
        named = parts[0].examples_of(number)
        texts = [
            "".join(chr(t - 3) if t > 3 else "" for t in row)
            for part in batches
            for row in part[number]["text"]
        ]
        assert len(named) == 8
        for where, text in zip(named, texts, strict=True):
            assert f"/{numbers_of([text])[0]}.jpg" in where


def test_resuming_far_away_is_instant(photos):
    (batch,) = take(train(photos), 1, start=10**15)
    assert batch["image"].shape == (8, SIZE, SIZE, 3)


@pytest.mark.parametrize("processes", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_global_batches_do_not_depend_on_the_processes(photos, straight, processes):
    parts = [
        take(train(photos, process_index=index, process_count=processes), 9, start=2)
        for index in range(processes)
    ]
    for number, batch in enumerate(straight[2:11]):
        joined = {name: np.concatenate([part[number][name] for part in parts]) for name in batch}
        assert_same(batch, joined)


def test_batch_size_and_chunks_do_not_change_the_stream(photos, monkeypatch):
    small = take(train(photos, batch_size=4), 30)
    monkeypatch.setattr("vlp_jax.data.preprocess_graph.CHUNK", 7)
    large = take(train(photos, batch_size=40), 3)
    for name in large[0]:
        np.testing.assert_array_equal(
            np.concatenate([batch[name] for batch in small]),
            np.concatenate([batch[name] for batch in large]),
        )


def test_only_needed_fields_are_read(photos, tmp_path):
    """Without `image` among the outputs, no file is opened: a missing decoder would not matter."""
    (tmp_path / "c.csv").write_text("path,caption\na.jpg,hello\n")
    (tmp_path / "a.jpg").write_bytes(b"no image at all")
    ops = {**TRAIN_OPS, "keep": {"fields": ["text"]}}
    broken = {"source": "folder", "path": str(tmp_path), "split": "all", "preprocess": ops}
    pipeline = TrainPipeline(broken, ByteTokenizer(16), batch_size=2, seed=0)
    (batch,) = take(pipeline, 1)
    assert batch.keys() == {"text"} == pipeline.batch_spec().keys()
    texts = list(sample_texts({**broken, "preprocess": TRAIN_OPS}, limit=3))
    assert texts == ["hello"] * 3


def test_sample_texts_are_what_training_sees(photos):
    texts = list(sample_texts(config(photos, {**TRAIN_OPS, "lowercase": {}}), limit=106))
    assert len(texts) == 106 and all(text == text.lower() for text in texts)
    assert sorted(numbers_of(texts)) == sorted([*range(53)] * 2)
    assert len(list(sample_texts(config(photos)))) == 5 * 53


# --------------------------------------------------------------------------------- evaluation


FEW = {(1, 1), (16, 2), (17, 2)}  # the others: make test-slow


@pytest.mark.parametrize(
    ("limit", "processes"),
    [
        pytest.param(limit, count, marks=[] if (limit, count) in FEW else pytest.mark.slow)
        for limit in (1, 7, 8, 9, 16, 17, 53)
        for count in (1, 2, 4)
    ],
)
def test_evaluation_sees_each_example_once(photos, limit, processes):
    seen, counts = [], set()
    for index in range(processes):
        pipeline = EvalPipeline(
            config(photos, {"choose_text": {"index": 0}, "keep": {"fields": ["text", "label"]}},
                   limit=limit),
            ByteTokenizer(16), batch_size=8, process_index=index, process_count=processes,
            extra_fields=["text_raw"],
        )  # fmt: skip
        assert len(pipeline) == limit
        batches = list(pipeline.batches())
        counts.add(len(batches))
        assert len(batches) == pipeline.num_batches == -(-limit // 8)
        for batch in batches:
            assert batch["mask"].dtype == bool and batch["text"].shape == (8 // processes, 16)
            seen += numbers_of(text.decode() for text in batch["text_raw"][batch["mask"]])
    assert len(counts) == 1 and sorted(seen) == list(range(limit))


def test_evaluation_in_order_with_extra_fields(photos):
    pipeline = EvalPipeline(
        config(photos, EVAL_OPS), ByteTokenizer(16), batch_size=20,
        extra_fields=("text_raw", "captions", "path"),
    )  # fmt: skip
    spec = pipeline.batch_spec()
    assert set(spec) == {"image", "text", "label", "mask"} and spec["mask"][0] == (20,)
    batches = list(pipeline.batches())
    paths = [p.decode() for b in batches for p in b["path"][b["mask"]]]
    assert paths == [f"{n}.jpg" for n in range(53)]
    captions = [c.tolist() for b in batches for c in b["captions"][b["mask"]]]
    assert captions[4:6] == [[b"Number 4"], [b"Number 5", b"Also 5"]]
    assert [t.decode() for t in batches[0]["text_raw"]] == [f"Number {n}" for n in range(20)]
    for again, batch in zip(pipeline.batches(), batches, strict=True):
        np.testing.assert_array_equal(again["image"], batch["image"])
    expected = np.asarray(Image.open(photos / "41.jpg").resize((SIZE, SIZE), Image.BICUBIC))
    image = batches[2]["image"][1].astype(int)
    assert np.abs(image - expected).max() <= 4
    without = EvalPipeline(config(photos, EVAL_OPS), None, batch_size=20)
    assert "text" not in without.batch_spec() and "text" not in next(without.batches())


# ----------------------------------------------------------------------------- arrays, no TF

ARRAYS_SCRIPT = """
import sys, itertools
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorflow", "tensorflow_datasets", "jax"):
            raise ImportError(name + " was imported")
sys.meta_path.insert(0, Refuse())
import numpy as np
from vlp_jax.data.pipeline import EvalPipeline, TrainPipeline
from vlp_jax.data.samples import sample_texts
from vlp_jax.data.tokenizers import ByteTokenizer
places = np.arange(11, dtype=np.uint8)
arrays = {"image": places[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8),
          "text": ["text %d" % n for n in range(11)], "label": np.arange(11)}
config = {"source": "arrays", "arrays": arrays}
three = EvalPipeline({**config, "where": {"label": 3}}, None, batch_size=2)
assert [b["label"].tolist() for b in three.batches()] == [[3, 3]] and len(three) == 1
tokenizer = ByteTokenizer(12)
train = TrainPipeline(config, tokenizer, batch_size=4, seed=0, process_index=1, process_count=2)
batches = list(itertools.islice(train.batches(5), 6))
for batch in batches:
    specs = {k: ((2 * v.shape[0], *v.shape[1:]), v.dtype) for k, v in batch.items()}
    assert specs == train.batch_spec()
    assert tokenizer.decode(batch["text"]) == ["text %d" % n for n in batch["label"]]
    assert (batch["image"][:, 0, 0, 0] == batch["label"]).all()
evaluation = EvalPipeline(config, tokenizer, batch_size=4, extra_fields=["text_raw"])
seen = [int(n) for batch in evaluation.batches() for n in batch["label"][batch["mask"]]]
assert seen == list(range(11)), seen
assert len(set(sample_texts(config))) == 11
tokens = {"source": "arrays", "arrays": {"text": np.zeros((5, 7), np.int32)}}
(batch,) = itertools.islice(TrainPipeline(tokens, None, batch_size=3, seed=0).batches(), 1)
assert batch["text"].shape == (3, 7)
print("labels", [batch["label"].tolist() for batch in batches])
"""


def test_arrays_need_no_tensorflow():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", ARRAYS_SCRIPT], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    # With TensorFlow, in the presence of operations, the order is the same.
    arrays = {"label": np.arange(11)}
    data = {"source": "arrays", "arrays": arrays, "preprocess": {"keep": {"fields": ["label"]}}}
    pipeline = TrainPipeline(data, None, batch_size=4, seed=0, process_index=1, process_count=2)
    labels = [batch["label"].tolist() for batch in take(pipeline, 6, start=5)]
    assert done.stdout.strip() == f"labels {labels}"


@pytest.mark.slow
def test_tensorflow_is_imported_without_keras_which_is_there_for_others():
    code = """
import sys
from vlp_jax.data.lazy_tensorflow import import_tensorflow
tf = import_tensorflow()
import tensorflow_datasets
assert not any(name.partition(".")[0] == "keras" for name in sys.modules)
assert tf.keras.layers.Dense(3)(tf.ones([1, 2])).shape == (1, 3)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_operations_on_arrays():
    arrays = {"image": np.random.default_rng(0).integers(0, 255, (6, 20, 30, 3), np.uint8),
              "text": [f"to the left {n}" for n in range(6)]}  # fmt: skip
    data = {"source": "arrays", "arrays": arrays, "preprocess": {"flip_left_right": {}}}
    pipeline = EvalPipeline(data, ByteTokenizer(30), batch_size=4)
    images = np.concatenate([batch["image"][batch["mask"]] for batch in pipeline.batches()])
    np.testing.assert_array_equal(images, arrays["image"])


# ----------------------------------------------------------------------------------- mistakes


def refuses(make, message):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_processes_must_divide_the_batch(photos):
    refuses(lambda: train(photos, batch_size=6, process_count=4), "batch_size=6 .* 4 processes")
    refuses(lambda: train(photos, batch_size=0), "batch_size=0")
    layout = BatchShare(8, process_index=3, process_count=4)
    assert layout.places.tolist() == [6, 7]


def test_configs_that_cannot_make_batches(photos):
    def pipeline(ops, **keys):
        return lambda: EvalPipeline(config(photos, ops), None, batch_size=4, **keys)

    refuses(pipeline({}), "'image' is still encoded")
    refuses(pipeline({"decode_image": {}}), "no fixed shape")
    refuses(pipeline({"choose_txt": {}}), "did you mean 'choose_text'")
    refuses(pipeline({"flip_left_right": {}}), "still encoded")
    refuses(pipeline(EVAL_OPS, extra_fields=["captoins"]), "did you mean 'captions'")
    no_text = {"decode_image": {}, "resize": {"size": 4}}
    refuses(pipeline(no_text, extra_fields=["text_raw"]), "no string 'text'")
    refuses(lambda: list(sample_texts(config(photos, no_text))), "no field 'text'")


@pytest.mark.parametrize("damage", ["truncated", pytest.param("text", marks=pytest.mark.slow)])
def test_an_image_that_cannot_be_decoded_is_named(photos, tmp_path, damage):
    for number in range(12):
        (tmp_path / f"{number}.jpg").write_bytes(jpeg(number))
    (tmp_path / "7.jpg").write_bytes(b"hello" if damage == "text" else jpeg(7)[:200])
    lines = ["path,caption", *(f"{n}.jpg,x" for n in range(12))]
    (tmp_path / "c.csv").write_text("\n".join(lines))
    data = {"source": "folder", "path": str(tmp_path), "split": "all", "preprocess": EVAL_OPS}
    pipeline = EvalPipeline({**data, "max_bad_fraction": 0.0}, None, batch_size=2)
    refuses(
        lambda: list(pipeline.batches()), rf"1 undecodable image in data.*{tmp_path.name}.*/7.jpg: "
    )


def test_a_file_that_vanished_is_named(photos, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    (tmp_path / "c.csv").write_text("path,caption\na.jpg,x\n")
    data = {"source": "folder", "path": str(tmp_path), "split": "all", "preprocess": EVAL_OPS}
    pipeline = TrainPipeline(data, None, batch_size=2, seed=0)
    (tmp_path / "a.jpg").unlink()
    refuses(lambda: next(pipeline.batches()), "a.jpg")

"""The tensorflow_datasets builder of the embedded dataset, on disk."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import pytest

from vlp_jax import errors
from vlp_jax.data.shapes import records, vocabulary

tfds = pytest.importorskip("tensorflow_datasets")
builder_lib = pytest.importorskip("vlp_jax.data.shapes.builder")


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def tiny(data_dir):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # That of protobuf 6 to tensorflow_datasets.
        warnings.filterwarnings("ignore", message=r"label\(\) is deprecated")
        return builder_lib.prepare("tiny", data_dir)


def source(builder, split):
    from array_record.python.array_record_data_source import ArrayRecordDataSource

    return ArrayRecordDataSource([os.fspath(p) for p in builder.info.splits[split].filepaths])


def decoded(builder, split, index):
    return builder.info.features.deserialize_example_np(source(builder, split)[index])


def test_prepared_splits_have_their_sizes(tiny):
    sizes = {name: split.num_examples for name, split in tiny.info.splits.items()}
    assert sizes == {"train": 512, "validation": 64, "test": 256}
    assert records.SPECS["default"].sizes == {"train": 20_000, "validation": 1_000, "test": 3_000}


def test_record_i_is_scene_i(tiny):
    spec = records.SPECS["tiny"]
    features = tiny.info.features
    for split, index in (("train", 0), ("train", 511), ("validation", 63), ("test", 17)):
        example, record = decoded(tiny, split, index), records.make_record(spec, split, index)
        assert example["id"].decode() == record["id"]
        assert [c.decode() for c in example["captions"]] == record["captions"]
        assert features["label"].int2str(int(example["label"])) == record["label"]
        assert bool(example["unseen"]) == record["unseen"]
        assert example["num_objects"] == len(record["objects"])
        np.testing.assert_allclose(
            example["objects"]["bbox"], [o["bbox"] for o in record["objects"]], atol=1e-6
        )
        for name, names in (("color", vocabulary.COLORS), ("position", vocabulary.POSITIONS)):
            assert [names[i] for i in example["objects"][name]] == [
                o[name] for o in record["objects"]
            ]
        asked = example["questions"]
        answers = [q["answer"] for q in record["questions"]]
        assert [a.decode() for a in asked["answer"]] == answers
        assert [vocabulary.ANSWERS[i] for i in asked["answer_label"]] == answers
        assert example["image"].shape == (64, 64, 3) and example["image"].dtype == np.uint8


def test_image_bytes_are_kept_as_they_were_encoded(tiny):
    record = records.make_record(records.SPECS["tiny"], "test", 5)
    assert record["image"] in source(tiny, "test")[5]


def test_second_build_is_byte_identical(tiny, tmp_path):
    again = builder_lib.prepare("tiny", tmp_path)
    for split in vocabulary.SPLITS:
        first, second = source(tiny, split), source(again, split)
        assert len(first) == len(second)
        assert all(first[i] == second[i] for i in range(len(first)))


def test_second_prepare_builds_nothing(tiny, data_dir, capsys):
    before = os.stat(tiny.info.splits["train"].filepaths[0]).st_mtime_ns
    again = builder_lib.prepare("tiny", data_dir)
    assert os.stat(again.info.splits["train"].filepaths[0]).st_mtime_ns == before
    assert capsys.readouterr().out == ""


def test_prepare_prints_one_line(tmp_path, capfd):
    builder_lib.prepare("video_tiny", tmp_path)
    captured = capfd.readouterr()
    assert captured.out == f"preparing shapes/video_tiny in {tmp_path} (once) ...\n"
    assert "Generating" not in captured.err


def test_builder_is_found_by_name(tiny, data_dir):
    builder = tfds.builder("shapes/tiny", data_dir=data_dir)
    assert type(builder) is builder_lib.Shapes
    example = builder.as_data_source("validation")[3]
    assert example["image"].shape == (64, 64, 3)
    assert example["id"] == b"validation-000003"


def test_records_can_be_parsed_in_a_tensorflow_graph(tiny):
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensor_slices([source(tiny, "test")[i] for i in range(3)])
    examples = list(dataset.map(tiny.info.features.deserialize_example))
    for i, example in enumerate(examples):
        assert example["id"].numpy().decode() == f"test-{i:06d}"
        assert example["image"].shape == (64, 64, 3)
        assert example["objects"]["bbox"].shape == (example["num_objects"], 4)
        assert example["captions"].shape == (vocabulary.CAPTIONS_PER_SCENE,)


def test_clips_are_written_with_a_box_per_frame(tmp_path):
    builder = builder_lib.prepare("video_tiny", tmp_path)
    example = decoded(builder, "test", 3)
    record = records.make_record(records.SPECS["video_tiny"], "test", 3)
    assert np.stack(example["video"]).shape == (8, 64, 64, 3)
    np.testing.assert_allclose(
        np.stack(example["objects"]["bboxes"]), [o["bboxes"] for o in record["objects"]]
    )
    assert vocabulary.MOTIONS[example["motion"]] == record["motion"]


def test_an_unknown_config_is_the_users_mistake(tmp_path):
    with pytest.raises(errors.UserError, match="did you mean 'tiny'"):
        builder_lib.prepare("tinny", tmp_path)


def test_a_directory_that_cannot_be_written_is_the_users_mistake(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.UserError, match="choose another data_dir"):
        builder_lib.prepare("tiny", tmp_path / "file")


_PREPARE = (
    "import sys; from vlp_jax.data.shapes import builder; builder.prepare('tiny', sys.argv[1])"
)


def _start(directory):
    return subprocess.Popen([sys.executable, "-c", _PREPARE, str(directory)])


@pytest.mark.slow
def test_a_killed_build_leaves_nothing_that_looks_finished(tmp_path):
    process = _start(tmp_path)
    config_dir = tmp_path / "shapes" / "tiny"
    deadline = time.time() + 60
    while not list(config_dir.glob("*incomplete*")) and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (config_dir / "1.0.0").exists()
    builder = builder_lib.prepare("tiny", tmp_path)
    assert len(source(builder, "train")) == 512


@pytest.mark.slow
def test_two_processes_that_prepare_at_once(tiny, tmp_path):
    processes = [_start(tmp_path) for _ in range(2)]
    assert [p.wait(timeout=120) for p in processes] == [0, 0]
    builder = builder_lib.prepare("tiny", tmp_path)
    assert source(builder, "test")[255] == source(tiny, "test")[255]
    assert not list((tmp_path / "shapes" / "tiny").glob("*incomplete*"))


@pytest.mark.slow
def test_the_loser_of_a_race_without_locks_uses_the_winners_files(tmp_path, monkeypatch, tiny):
    split_generators = builder_lib.Shapes._split_generators

    def slower_than_another_process(self, dl_manager):
        assert _start(tmp_path).wait(timeout=120) == 0
        return split_generators(self, dl_manager)

    monkeypatch.setattr(builder_lib, "_one_at_a_time", contextlib.nullcontext)
    monkeypatch.setattr(builder_lib.Shapes, "_split_generators", slower_than_another_process)
    builder = builder_lib.prepare("tiny", tmp_path)
    assert source(builder, "train")[0] == source(tiny, "train")[0]
    assert not list((tmp_path / "shapes" / "tiny").glob("*incomplete*"))

import json
import os
import struct
import subprocess
import sys
import types

import jax
import ml_collections
import numpy as np
import pytest

from vlp_jax.errors import UserError
from vlp_jax.observe import writers
from vlp_jax.observe.jsonl import read_metrics
from vlp_jax.observe.writers import (
    JsonlWriter,
    MultiWriter,
    NullWriter,
    TensorBoardWriter,
    WandbWriter,
    build_writers,
)

_IMAGE = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
_OFF = {"enabled": False, "project": "vlp_jax", "name": None, "mode": "offline"}


def _events(directory):
    """All events of all event files, oldest file first (TFRecord framing, CRCs skipped)."""
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(directory.glob("events.*"), key=lambda p: p.stat().st_mtime_ns):
        data, position = path.read_bytes(), 0
        while position < len(data):
            (length,) = struct.unpack_from("<Q", data, position)
            events.append(Event.FromString(data[position + 12 : position + 12 + length]))
            position += 12 + length + 4
    return events


def _scalars(events):
    return {
        (event.step, value.tag): value.simple_value
        for event in events
        for value in event.summary.value
        if value.WhichOneof("value") == "simple_value"
    }


def test_tensorboard_has_scalars_images_and_texts(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    writer.write_scalars(5, {"train/loss": 0.25, "perf/mfu": np.float32(0.5)})
    writer.write_images(5, {"reconstruction": _IMAGE})
    writer.write_text(5, {"caption": "a red circle"})
    writer.close()
    events = _events(tmp_path)
    assert _scalars(events) == {(5, "train/loss"): 0.25, (5, "perf/mfu"): 0.5}
    values = [value for event in events for value in event.summary.value]
    (image,) = [v.image for v in values if v.WhichOneof("value") == "image"]
    assert (image.height, image.width) == (8, 12)
    assert any(b"a red circle" in v.tensor.SerializeToString() for v in values)


def test_tensorboard_resume_purges_later_steps(tmp_path):
    from tensorboardX.proto.event_pb2 import SessionLog

    for start, steps in ((0, range(8)), (4, range(4, 6))):
        writer = TensorBoardWriter(tmp_path, start)
        for step in steps:
            writer.write_scalars(step, {"loss": float(step)})
        writer.close()
    starts = [e.step for e in _events(tmp_path) if e.session_log.status == SessionLog.START]
    assert starts == [0, 4]


def test_tensorboard_does_not_import_tensorflow(tmp_path):
    code = (
        "import sys; from vlp_jax.observe.writers import TensorBoardWriter as W; "
        f"w = W({str(tmp_path)!r}); w.write_scalars(1, {{'a': 1.0}}); w.close(); "
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=_child_env())


def test_images_of_the_wrong_kind_are_refused(tmp_path):
    writer = TensorBoardWriter(tmp_path)
    with pytest.raises(ValueError, match="uint8"):
        writer.write_images(0, {"x": np.zeros((4, 4, 3), np.float32)})
    with pytest.raises(ValueError, match="height, width, 3"):
        writer.write_images(0, {"x": np.zeros((4, 4), np.uint8)})
    writer.close()


def test_remote_tensorboard_is_a_user_error():
    with pytest.raises(UserError, match="local directory"):
        TensorBoardWriter("gs://bucket/run")


def test_multi_writer_passes_on_and_closes_all_even_if_one_fails(tmp_path):
    class Failing(NullWriter):
        def close(self):
            raise OSError("disk full")

    calls = []

    class Recording(NullWriter):
        def write_scalars(self, step, scalars):
            calls.append((step, dict(scalars)))

        def close(self):
            calls.append("closed")

    multi = MultiWriter([Recording(), Failing(), Recording()])
    multi.write_scalars(1, {"a": 2.0})
    with pytest.raises(OSError, match="disk full"):
        multi.close()
    assert calls == [(1, {"a": 2.0})] * 2 + ["closed"] * 2


def test_build_writers_takes_a_config_dict(tmp_path):
    config = ml_collections.ConfigDict({"tensorboard": True, "wandb": _OFF})
    writer = build_writers(config, tmp_path, 0, {})
    writer.write_scalars(2, {"loss": 1.0})
    writer.write_images(2, {"im": _IMAGE})
    writer.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["loss"] == 1.0
    assert _scalars(_events(tmp_path / "tensorboard")) == {(2, "loss"): 1.0}


def test_build_writers_without_tensorboard_makes_jsonl_alone(tmp_path):
    writer = build_writers({"tensorboard": False, "wandb": _OFF}, tmp_path, 0, {})
    writer.write_scalars(2, {"loss": 1.0})
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = build_writers({"tensorboard": True, "wandb": _OFF}, tmp_path, 0, {})
    assert isinstance(writer, NullWriter)
    writer.write_scalars(0, {"a": 1.0})
    writer.write_images(0, {"a": _IMAGE})
    writer.write_text(0, {"a": "b"})
    writer.flush()
    writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failing_later_writer_closes_the_earlier_ones(tmp_path, monkeypatch):
    closed = []
    close = JsonlWriter.close
    monkeypatch.setattr(JsonlWriter, "close", lambda self: (closed.append(1), close(self)))

    def refused(*arguments):
        raise UserError("no login")

    monkeypatch.setattr(writers, "WandbWriter", refused)
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace())
    config = {"tensorboard": False, "wandb": {**_OFF, "enabled": True}}
    with pytest.raises(UserError, match="no login"):
        build_writers(config, tmp_path, 0, {})
    assert closed == [1]


def test_wandb_that_is_missing_is_noticed_before_a_file_is_made(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = {"tensorboard": True, "wandb": {**_OFF, "enabled": True}}
    with pytest.raises(UserError, match="pip install wandb"):
        build_writers(config, tmp_path, 0, {})
    assert not list(tmp_path.iterdir())


def test_wandb_mode_is_checked_before_anything_else(tmp_path):
    with pytest.raises(UserError, match="online, offline"):
        WandbWriter(tmp_path, "p", None, {}, mode="of")


def test_wandb_calls_with_a_stand_in(tmp_path, monkeypatch):
    """What wandb is asked for, also where wandb is not installed."""
    fake = _FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for start in (0, 7):
        writer = WandbWriter(tmp_path, "proj", "name", {"a": {"b": None}}, start, "offline")
        writer.write_scalars(start + 1, {"loss": np.float32(0.5)})
        writer.write_images(start + 1, {"im": _IMAGE})
        writer.write_text(start + 1, {"t": "hi"})
        writer.close()
    first, second = fake.inits
    assert first["id"] == second["id"] == (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert first["mode"] == "offline" and first["resume"] == "allow"
    assert first["config"] == {"a": {"b": None}}
    assert {"step": 8, "loss": 0.5} in fake.rows and {"step": 8, "t": "hi"} in fake.rows
    assert fake.finished == 2

    fake.fail = True
    with pytest.raises(UserError, match="wandb login"):
        WandbWriter(tmp_path, "proj", None, {}, 0, "online")


def test_wandb_offline_for_real(tmp_path, monkeypatch, capfd):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_API_KEY", "")
    assert wandb.__version__
    for start in (0, 5):
        config = {"tensorboard": False, "wandb": {**_OFF, "enabled": True}}
        writer = build_writers(config, tmp_path, start, {"model": {"width": 64}})
        writer.write_scalars(start + 1, {"train/loss": 0.75})
        writer.write_images(start + 1, {"im": _IMAGE})
        writer.flush()
        writer.close()
    runs = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    run_id = (tmp_path / "wandb_run_id.txt").read_text().strip()
    assert runs and {path.name for path in runs} == {f"run-{run_id}.wandb"}
    assert any(b"train/loss" in path.read_bytes() for path in runs)
    assert any(b"width" in path.read_bytes() for path in runs)
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/*.png"))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 6]
    captured = capfd.readouterr()
    assert captured.out == "" and "api" not in captured.err.lower()


class _FakeWandb:
    """The few names of wandb that WandbWriter uses."""

    class errors:  # noqa: N801
        class Error(Exception):
            pass

    Settings = staticmethod(dict)
    Image = staticmethod(lambda image: ("image", image.shape))

    def __init__(self):
        self.inits, self.rows, self.finished, self.fail = [], [], 0, False

    def init(self, **kwargs):
        if self.fail:
            raise self.errors.Error("no\nAPI key")
        self.inits.append(kwargs)
        return self

    def define_metric(self, name, step_metric=None):
        json.dumps([name, step_metric])

    def log(self, row):
        self.rows.append(row)

    def finish(self):
        self.finished += 1


def _child_env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_tensorboard_writes_nothing_to_a_full_disk_and_says_so_once(tmp_path, monkeypatch, caplog):
    free = [0]
    monkeypatch.setattr(
        "vlp_jax.observe.writers.shutil.disk_usage",
        lambda path: type("Usage", (), {"free": free[0]}),
    )
    writer = TensorBoardWriter(tmp_path)
    for step in range(3):
        writer.write_scalars(step, {"loss": 1.0})
        writer.write_text(step, {"note": "x"})
    free[0] = 1 << 30
    writer.write_scalars(3, {"loss": 2.0})
    writer.close()
    assert _scalars(_events(tmp_path)) == {(3, "loss"): 2.0}
    assert len([r for r in caplog.records if "the disk is full" in r.message]) == 1

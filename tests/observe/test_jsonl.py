import json
import math
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.observe.jsonl import JsonlWriter, _RemoteLines, read_metrics


def _write(path, steps, start_step=0):
    writer = JsonlWriter(path, start_step)
    for step in steps:
        writer.write_scalars(step, {"loss": step / 10})
    writer.close()


def test_each_line_is_strict_json_with_step_and_time(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    writer = JsonlWriter(path)
    writer.write_scalars(3, {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1.5})
    writer.close()

    def refuse(token):
        raise AssertionError(f"{token} is not JSON")

    record = json.loads(path.read_text(), parse_constant=refuse)
    assert record["step"] == 3 and record["d"] == 1.5
    assert (record["a"], record["b"], record["c"]) == ("nan", "inf", "-inf")
    assert 1.6e9 < record["time"] < 1e11
    (read,) = read_metrics(path)
    assert math.isnan(read["a"]) and read["b"] == math.inf and read["c"] == -math.inf


def test_floats_round_trip_exactly(tmp_path):
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 300, dtype=np.uint32)
    singles = bits.view(np.float32)
    singles = singles[np.isfinite(singles)]
    doubles = rng.standard_normal(300) * 10.0 ** rng.integers(-300, 300, 300)
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    for step, (single, double) in enumerate(zip(singles, doubles, strict=False)):
        writer.write_scalars(step, {"single": single, "double": double})
    writer.close()
    records = read_metrics(path)
    assert len(records) > 250
    for record, single, double in zip(records, singles, doubles, strict=False):
        assert np.float32(record["single"]).tobytes() == single.tobytes()
        assert record["double"] == double


def test_resume_leaves_every_step_once(tmp_path):
    path = tmp_path / "m.jsonl"
    _write(path, range(10))
    _write(path, range(6, 12), start_step=6)
    assert [record["step"] for record in read_metrics(path)] == list(range(12))
    assert [p.name for p in tmp_path.iterdir()] == ["m.jsonl"]  # no temporary file stays


def test_a_run_from_scratch_forgets_the_old_one(tmp_path):
    path = tmp_path / "m.jsonl"
    _write(path, range(5))
    _write(path, [0])
    assert [record["step"] for record in read_metrics(path)] == [0]


@pytest.mark.parametrize("torn", ['{"step": 3, "ti', '{"step": 3, "loss": 0.3}', "\x00\x00\n"])
def test_a_torn_last_line_is_skipped_and_then_removed(tmp_path, torn):
    path = tmp_path / "m.jsonl"
    _write(path, range(3))
    with open(path, "a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2]
    _write(path, [9], start_step=9)
    assert [record["step"] for record in read_metrics(path)] == [0, 1, 2, 9]
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 0}\nnot json\n{"step": 1}\n')
    with pytest.raises(UserError, match=r"m\.jsonl line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match=r"m\.jsonl line 2"):
        JsonlWriter(path, 1)


def test_a_killed_process_loses_no_whole_line(tmp_path):
    path = tmp_path / "m.jsonl"
    code = f"""
        import os, signal
        from vlp_jax.observe.jsonl import JsonlWriter
        writer = JsonlWriter({str(path)!r})
        for step in range(100):
            writer.write_scalars(step, {{"loss": 1.0}})
        os.kill(os.getpid(), signal.SIGKILL)
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=_child_env())
    assert result.returncode == -signal.SIGKILL
    assert [record["step"] for record in read_metrics(path)] == list(range(100))


def test_texts_survive_and_are_not_taken_for_floats(tmp_path):
    path = tmp_path / "m.jsonl"
    writer = JsonlWriter(path)
    writer.write_text(1, {"caption": "nan", "other": "two\nlines"})
    writer.close()
    (record,) = read_metrics(path)
    assert record["texts"] == {"caption": "nan", "other": "two\nlines"}


def test_reserved_names_and_missing_files(tmp_path):
    writer = JsonlWriter(tmp_path / "m.jsonl")
    with pytest.raises(ValueError, match="step"):
        writer.write_scalars(1, {"step": 2.0})
    with pytest.raises(UserError, match="does not exist"):
        read_metrics(tmp_path / "none.jsonl")


def test_remote_lines_are_uploaded_whole_on_flush_and_close(tmp_path):
    path = epath.Path(tmp_path / "remote.jsonl")
    lines = _RemoteLines(path, [b"kept\n"], upload_seconds=1e9)
    lines.append(b"one\n")
    assert not path.exists()
    lines.flush()
    assert path.read_text() == "kept\none\n"
    lines.append(b"two\n")
    lines.close()
    assert path.read_text() == "kept\none\ntwo\n"
    eager = _RemoteLines(path, [], upload_seconds=0.0)
    eager.append(b"at once\n")
    assert path.read_text() == "at once\n"


def _child_env():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def test_a_full_disk_keeps_the_lines_until_there_is_room(tmp_path, caplog):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this needs a mount, which is not allowed here")
    try:
        writer = JsonlWriter(disk / "metrics.jsonl")
        writer.write_scalars(0, {"loss": 1.0})
        filler = disk / "filler"
        with pytest.raises(OSError), open(filler, "wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
        for step in range(1, 200):  # more than the page that the file has already
            writer.write_scalars(step, {"loss": 1.0})
            writer.flush()
        assert len(read_metrics(disk / "metrics.jsonl")) < 200
        assert len([r for r in caplog.records if "metrics wait in memory" in r.message]) == 1
        filler.unlink()
        writer.write_scalars(200, {"loss": 1.0})
        assert [r["step"] for r in read_metrics(disk / "metrics.jsonl")] == list(range(201))
        writer.close()
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)

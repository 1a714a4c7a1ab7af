"""Checkpoints that are damaged are set aside; saves that fail do not end a run at once."""

import errno
import json
import os
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
from etils import epath
from test_processes import ROOT, free_port

from vlp_jax.errors import CannotSave, UserError
from vlp_jax.training import checkpoint_files
from vlp_jax.training.checkpoint import Checkpointer


@pytest.fixture(scope="module")
def setup():
    return helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 2}, 4)


@pytest.fixture(scope="module")
def state(setup):
    return helpers.fresh(setup)


@pytest.fixture
def told():
    return []


@pytest.fixture
def saved(tmp_path, state):
    """A workdir with the checkpoints 1, 2 and 3."""
    with Checkpointer(tmp_path, keep_last=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, {"position": step})
    return tmp_path


def largest_file(directory):
    return max((f for f in directory.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(directory):
    file = largest_file(directory)
    os.truncate(file, file.stat().st_size // 2)
    return "bytes and not"


def flip_a_bit(directory):
    file = largest_file(directory)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    return "has other contents than were written"


def remove_a_file(directory):
    largest_file(directory).unlink()
    return "is missing"


def damage_the_checksums(directory):
    (directory / "checksums.json").write_text('{"state')
    return "cannot be read"


DAMAGES = [truncate, flip_a_bit, remove_a_file, damage_the_checksums]


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_one_before_a_damaged_checkpoint_is_used(saved, setup, state, told, damage):
    what = damage(saved / "checkpoints" / "3")
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        assert checkpointer.check_fits(setup.abstract) == 2
        restored = checkpointer.restore(setup.abstract, 2)
        checkpointer.save(3, state, {"position": 3})  # the number is free again
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
    [line] = told
    assert "the checkpoint of step 3 is damaged" in line and what in line
    [kept] = (saved / "damaged").iterdir()
    assert str(kept) in line and largest_file(kept).exists()
    assert checkpoint_files.damage(epath.Path(saved / "checkpoints" / "3")) is None


def test_several_damaged_ones_and_no_sound_one(saved, told):
    for step in (1, 2, 3):
        truncate(saved / "checkpoints" / str(step))
    with Checkpointer(saved, tell=told.append) as checkpointer:
        assert checkpointer.steps() == [] and checkpointer.latest_step() is None
    assert len(told) == 3 and len(list((saved / "damaged").iterdir())) == 3


def test_an_older_damaged_one_is_left_until_it_is_needed(saved, told):
    truncate(saved / "checkpoints" / "1")
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]
    assert told == []


def test_reading_alone_changes_nothing(saved, state):
    truncate(saved / "checkpoints" / "3")
    unfinished = saved / "checkpoints" / "4.orbax-checkpoint-tmp"
    unfinished.mkdir()
    with Checkpointer(saved, read_only=True) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3]
    assert unfinished.exists() and not (saved / "damaged").exists()


def test_checksums_are_of_every_file(saved):
    record = json.loads((saved / "checkpoints" / "3" / "checksums.json").read_text())
    for name in ("state/manifest.ocdbt", "input/metadata"):
        size, crc = record[name]
        assert size == (saved / "checkpoints" / "3" / name).stat().st_size and len(crc) == 8


def full_disk(directory):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


@pytest.mark.parametrize("asynchronous", [True, False])
def test_a_save_that_fails_leaves_the_run_and_the_older_ones(
    saved, setup, state, told, monkeypatch, asynchronous
):
    with Checkpointer(
        saved, keep_last=3, asynchronous=asynchronous, max_failed=3, tell=told.append
    ) as checkpointer:
        monkeypatch.setattr(checkpoint_files, "write_checksums", full_disk)
        checkpointer.save(4, state, {"position": 4})
        checkpointer.wait()
        [line] = told
        assert "step 4 could not be saved" in line and "No space left" in line
        assert "the newest is of step 3" in line and "1 of 3" in line
        assert checkpointer.steps() == [1, 2, 3]
        assert {f.name for f in (saved / "checkpoints").iterdir()} == {"1", "2", "3"}
        monkeypatch.undo()
        checkpointer.save(5, state, {"position": 5})
        checkpointer.finish(5)
        assert checkpointer.steps() == [2, 3, 5] and checkpointer.failed == 1
        restored = checkpointer.restore(setup.abstract, 5)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))


def test_too_many_in_a_row_end_the_run(saved, state, told, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "write_checksums", full_disk)
    with Checkpointer(saved, max_failed=2, asynchronous=False, tell=told.append) as checkpointer:
        checkpointer.save(4, state, {"position": 4})
        with pytest.raises(CannotSave, match="2 saves in a row have failed: make room"):
            checkpointer.save(5, state, {"position": 5})
    assert len(told) == 1


def test_what_has_to_be_saved_and_is_not(saved, state, monkeypatch):
    with Checkpointer(saved, keep_last=3, tell=lambda line: None) as checkpointer:
        monkeypatch.setattr(checkpoint_files, "write_checksums", full_disk)
        checkpointer.save(4, state, {"position": 4})
        with pytest.raises(CannotSave, match="step 4 could not be saved .* newest is of step 3"):
            checkpointer.finish(4)


def test_poll_tells_of_a_failure_without_another_save(saved, state, told, monkeypatch):
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        monkeypatch.setattr(checkpoint_files, "write_checksums", full_disk)
        checkpointer.save(4, state, {"position": 4})
        for _ in range(600):
            checkpointer.poll()
            if told:
                break
            import time

            time.sleep(0.05)
        assert len(told) == 1


def test_nothing_is_begun_where_there_is_no_room(saved, state, told, monkeypatch):
    monkeypatch.setattr(checkpoint_files, "free_bytes", lambda directory: 1000)
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        checkpointer.save(4, state, {"position": 4})
        assert checkpointer.steps() == [1, 2, 3]
    [line] = told
    assert "1,000 bytes are free" in line


def test_a_directory_that_cannot_be_looked_at_is_a_save_that_fails(saved, state, told, monkeypatch):
    def stale(directory):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))

    monkeypatch.setattr(checkpoint_files, "free_bytes", stale)
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        checkpointer.save(4, state, {"position": 4})
        assert checkpointer.steps() == [1, 2, 3] and checkpointer.failed == 1
    [line] = told
    assert "cannot be looked at" in line and "newest is of step 3" in line


FAILS_ON_ONE = """
import sys
import jax, jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec
from orbax.checkpoint._src.multihost import multihost
from vlp_jax.parallel import agreement, startup
from vlp_jax.training.checkpoint import Checkpointer

folder, port, me = sys.argv[1], sys.argv[2], int(sys.argv[3])
startup.initialize(f"127.0.0.1:{port}", 2, me, expected=2)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
spread = NamedSharding(mesh, PartitionSpec("data"))
state = {"a": jax.jit(lambda: jnp.arange(8.0), out_shardings=spread)()}

multihost._DEFAULT_BARRIER_TIMEOUT = 5  # seconds; 300
whole = ocp.StandardCheckpointHandler.async_save

async def raises(*arguments, **more):
    raise OSError("the copy failed")

told = []
with Checkpointer(folder, tell=told.append) as checkpointer:
    if me == 1:
        ocp.StandardCheckpointHandler.async_save = raises
    checkpointer.save(1, state, {"position": 1})
    ocp.StandardCheckpointHandler.async_save = whole
    assert agreement.gather("met") == ["met", "met"]  # nobody is a message ahead of the other
    checkpointer.wait()
    [line] = told
    assert "step 1 could not be saved" in line, line
    checkpointer.save(2, state, {"position": 2})
    checkpointer.finish(2)
    assert checkpointer.steps() == [2] and len(told) == 1, told
print("done")
"""


def test_a_save_that_fails_on_one_of_two_processes(tmp_path):
    port = str(free_port())
    jobs = [
        subprocess.Popen(
            [sys.executable, "-c", FAILS_ON_ONE, str(tmp_path), port, str(index)],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    for job in jobs:
        output = job.communicate(timeout=240)[0]
        assert job.returncode == 0 and output.endswith("done\n"), output


def mounted(directory, *options):
    directory.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(directory)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("this needs a mount, which is not allowed here")


def unmount(directory):
    subprocess.run(["umount", "-l", str(directory)], check=True)


def test_a_disk_that_is_really_full(tmp_path, setup, state, told, monkeypatch):
    disk = tmp_path / "disk"
    mounted(disk, "size=3m")
    try:
        # The look ahead is not what is tested here.
        monkeypatch.setattr(checkpoint_files, "free_bytes", lambda directory: None)
        with Checkpointer(disk, keep_last=2, tell=told.append) as checkpointer:
            checkpointer.save(1, state, {"position": 1})
            checkpointer.finish(1)
            used = checkpoint_files.size_of(epath.Path(disk))
            free = os.statvfs(disk).f_bavail * 4096
            (disk / "other").write_bytes(b"x" * int(free - used / 2))
            checkpointer.save(2, state, {"position": 2})
            checkpointer.wait()
            assert len(told) == 1 and "step 2 could not be saved" in told[0]
            (disk / "other").unlink()
            checkpointer.save(3, state, {"position": 3})
            checkpointer.finish(3)
            assert checkpointer.steps() == [1, 3]
    finally:
        unmount(disk)


def test_a_folder_that_is_read_only(tmp_path, state):
    disk = tmp_path / "checkpoints"
    mounted(disk, "ro")
    try:
        with pytest.raises(UserError, match="cannot be kept in .*Read-only file system"):
            Checkpointer(tmp_path)
    finally:
        unmount(disk)

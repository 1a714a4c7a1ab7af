"""Checkpoints that are damaged are set aside; saves that fail do not end a run at once."""

import errno
import json
import os
import shutil
import subprocess
import sys

import helpers
import jax
import numpy as np
import pytest
from etils import epath
from test_processes import ROOT, free_port

from vlp_jax.errors import CannotSave, UserError
from vlp_jax.training import checkpoint_files, restore
from vlp_jax.training.checkpoint import Checkpointer, choose_step, saved_steps
from vlp_jax.training.restore import SavedParameters


@pytest.fixture(scope="module")
def setup():
    return helpers.setup_on(helpers.tiny_config(), {"replica": 2, "fsdp": 2}, 4)


@pytest.fixture(scope="module")
def state(setup):
    return helpers.fresh(setup)


@pytest.fixture
def told():
    return []


@pytest.fixture(scope="module")
def three_checkpoints(tmp_path_factory, state):
    """A workdir with the checkpoints 1, 2 and 3; not to be written to."""
    workdir = tmp_path_factory.mktemp("three")
    with Checkpointer(workdir, keep_last=3) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, state, {"position": step})
    return workdir


@pytest.fixture
def saved(tmp_path, three_checkpoints):
    """A copy of the workdir with the checkpoints 1, 2 and 3."""
    return shutil.copytree(three_checkpoints, tmp_path, dirs_exist_ok=True)


def largest_file(directory):
    """The largest of the files that hold arrays: OCDBT keeps them in folders named `d`.

    Descriptions beside them may be larger, and a checkpoint can be read without some of these.
    """
    files = (f for f in directory.rglob("d/*") if f.is_file())
    return max(files, key=lambda f: f.stat().st_size)


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


def empty_the_checksums(directory):
    (directory / "checksums.json").write_text("")
    return "cannot be read"


def checksums_of_another_kind(directory):
    (directory / "checksums.json").write_text('["state/manifest.ocdbt"]')
    return "does not list files with their sizes"


def checksums_of_nothing(directory):
    (directory / "checksums.json").write_text("{}")
    return "does not list state/_METADATA"


def empty_the_folder(directory):
    shutil.rmtree(directory)
    directory.mkdir()
    return "state/_METADATA is missing"


def a_plain_file(directory):
    shutil.rmtree(directory)
    directory.write_text("")
    return "it is no folder"


def leave_temporary_names(directory):
    for name in ("state", "input"):
        (directory / name).rename(directory / f"{name}.orbax-checkpoint-tmp")
    return "state/_METADATA is missing"


def without_checksums(damage):
    """Nothing but the files themselves can tell then, as after a copy that was interrupted."""

    def both(directory):
        (directory / "checksums.json").unlink()
        return damage(directory)

    both.__name__ = f"{damage.__name__}_and_the_checksums"
    return both


def remove_the_largest(directory):
    largest_file(directory).unlink()
    return "it cannot be read"


def truncate_the_largest(directory):
    truncate(directory)
    return "it cannot be read"


def leave_the_state_alone(directory):
    shutil.rmtree(directory / "input")
    return "input/metadata is missing"


def remove_the_manifest(directory):
    (directory / "state" / "manifest.ocdbt").unlink()
    return "state/manifest.ocdbt is missing"


def remove_the_metadata(directory):
    (directory / "state" / "_METADATA").unlink()
    return "state/_METADATA is missing"


def break_the_metadata(directory):
    (directory / "state" / "_METADATA").write_text('{"tree_metadata": ')
    return "it cannot be read"


def break_the_record_of_the_input(directory):
    (directory / "input" / "metadata").write_text("")
    return "it cannot be read"


# With their checksums.
KNOWN = [
    truncate,
    remove_a_file,
    damage_the_checksums,
    empty_the_checksums,
    checksums_of_another_kind,
    checksums_of_nothing,
    empty_the_folder,
    leave_temporary_names,
    remove_the_manifest,
    remove_the_metadata,
]
UNKNOWN = [
    without_checksums(damage)
    for damage in (
        remove_the_largest,
        truncate_the_largest,
        leave_the_state_alone,
        remove_the_manifest,
        remove_the_metadata,
        break_the_metadata,
        break_the_record_of_the_input,
    )
]
DAMAGES = [*KNOWN, flip_a_bit, a_plain_file, *UNKNOWN]


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
    assert str(kept) in line and not (saved / "checkpoints" / "damaged").exists()
    assert checkpoint_files.damage(epath.Path(saved / "checkpoints" / "3")) is None


@pytest.mark.parametrize("damage", [truncate, a_plain_file, without_checksums(remove_the_largest)])
def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(saved, told, damage):
    for step in (1, 2, 3):
        damage(saved / "checkpoints" / str(step))
    before = sorted(saved.rglob("*"))
    with pytest.raises(UserError, match="every checkpoint in .* is damaged .*step 3: .*step 1: "):
        Checkpointer(saved, tell=told.append)
    assert sorted(saved.rglob("*")) == before and told == []


def test_two_damaged_ones_are_set_aside_and_one_without_checksums_is_not(saved, told):
    """It was written by an older version, and all of it can be read."""
    truncate(saved / "checkpoints" / "3")
    empty_the_folder(saved / "checkpoints" / "2")
    (saved / "checkpoints" / "1" / "checksums.json").unlink()
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        assert checkpointer.steps() == [1]
    assert len(told) == 2 and len(list((saved / "damaged").iterdir())) == 2


def test_names_that_are_no_checkpoints_are_left_alone(saved, told):
    for name in ("004", "4 (copy)", "4.bak"):
        (saved / "checkpoints" / name).mkdir()
    (saved / "checkpoints" / ".DS_Store").write_text("")
    (saved / "checkpoints" / "newest").symlink_to("3")
    with Checkpointer(saved, keep_last=3, tell=told.append) as checkpointer:
        assert checkpointer.steps() == [1, 2, 3] and told == []
    assert saved_steps(epath.Path(saved)) == [1, 2, 3]


def test_what_cannot_be_set_aside_is_said_in_one_line(saved):
    truncate(saved / "checkpoints" / "3")
    (saved / "damaged").write_text("")  # a file where the folder would be
    with pytest.raises(UserError, match="cannot be moved to .*damaged.*move it out of the way"):
        Checkpointer(saved)


@pytest.mark.parametrize("damage", [*KNOWN, *UNKNOWN])
def test_who_only_reads_names_the_damaged_one_and_another(saved, setup, damage):
    """And moves nothing."""
    damage(saved / "checkpoints" / "3")
    before = sorted(saved.rglob("*"))
    workdir = epath.Path(saved)

    def read(step):
        return SavedParameters.of(workdir, choose_step(workdir, step)).read()

    for step in (None, 3):
        with pytest.raises(UserError) as caught:
            read(step)
        message = str(caught.value)
        assert f"checkpoint of step 3 in {saved} is damaged (" in message
        assert message.endswith("take step 2 instead") and "\n" not in message
    assert read(2).keys() == read(1).keys() and sorted(saved.rglob("*")) == before


def test_what_reading_brings_to_light_is_said_in_one_line(saved, monkeypatch):
    """And an error for which the checkpoint is not to blame keeps its traceback."""

    def fails(*_):
        raise ValueError("DATA_LOSS: zstd-compressed data is corrupt")

    workdir = epath.Path(saved)
    monkeypatch.setattr(restore, "_restore", fails)
    with pytest.raises(ValueError, match="DATA_LOSS"):
        SavedParameters.of(workdir, choose_step(workdir, 3)).read()
    flip_a_bit(saved / "checkpoints" / "3")
    with pytest.raises(UserError, match="is damaged .*other contents.*; take step 2 instead"):
        SavedParameters.of(workdir, choose_step(workdir, 3)).read()


def test_who_only_reads_is_told_that_no_other_is_sound(saved):
    for step in (1, 2, 3):
        truncate(saved / "checkpoints" / str(step))
    with pytest.raises(UserError, match="step 3 .* is damaged .*; there is no other sound one"):
        choose_step(epath.Path(saved), None)


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
whole = ocp.PyTreeCheckpointHandler.async_save

async def raises(*arguments, **more):
    raise OSError("the copy failed")

told = []
with Checkpointer(folder, tell=told.append) as checkpointer:
    if me == 1:
        ocp.PyTreeCheckpointHandler.async_save = raises
    checkpointer.save(1, state, {"position": 1})
    ocp.PyTreeCheckpointHandler.async_save = whole
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

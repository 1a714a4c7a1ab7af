"""A folder that is there whole or not at all."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from vlp_jax.errors import UserError
from vlp_jax.interop.staging import staged

ROOT = Path(__file__).resolve().parent.parent.parent
KILLED = """
import os, sys
from pathlib import Path
from vlp_jax.interop.staging import staged
with staged(Path(sys.argv[1]), False) as folder:
    (folder / "model.safetensors").write_text("half")
    os.kill(os.getpid(), 9)
"""


def names(folder):
    return sorted(str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file())


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_that_is_empty_or_not_there(there, tmp_path):
    target = tmp_path / "a" / "b"
    if there:
        target.mkdir(parents=True)
    with staged(target, False) as folder:
        assert folder.name == "b" and folder != target
        (folder / "sub").mkdir()
        (folder / "sub" / "x").write_text("1")
        assert names(target.parent) and (not there or not names(target))
    assert names(tmp_path) == ["a/b/sub/x"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(KeyError), staged(tmp_path / "new", False) as folder:
        (folder / "x").write_text("1")
        raise KeyError("x")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_that_looks_whole(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "new"]
    assert subprocess.run(command, cwd=ROOT).returncode == -9
    assert not (tmp_path / "new").exists()
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".new.unfinished-")
    with staged(tmp_path / "new", False) as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path / "new") == ["x"]


def test_what_is_in_the_way(tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "closed").mkdir()
    for name, overwrite, message in (
        ("file", True, "is a file"),
        ("full", False, "is not empty.*--overwrite"),
        ("link", True, "link to nothing"),
        ("file/below", False, "cannot be made"),
    ):
        with pytest.raises(UserError, match=message), staged(tmp_path / name, overwrite):
            raise AssertionError("it must not begin")
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "x").read_text() == "mine"


def test_overwriting_replaces_an_earlier_export_and_nothing_else(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    outside = tmp_path.parent / "outside"
    outside.write_text("not of the folder")
    old = {"model.npz": {}, "config.json": {}, "../outside": {}, str(outside): {}}
    for name in ("model.npz", "config.json"):
        (tmp_path / name).write_text("old")
    (tmp_path / "export.json").write_text(json.dumps({"files": old}))
    with staged(tmp_path, True) as folder:
        (folder / "config.json").write_text("new")
        (folder / "export.json").write_text(json.dumps({"files": {"config.json": {}}}))
        assert (tmp_path / "config.json").read_text() == "old"  # until all is written
    assert names(tmp_path) == ["config.json", "export.json", "mine.txt"]
    assert (tmp_path / "config.json").read_text() == "new" and outside.exists()


def test_a_broken_record_does_not_stay(tmp_path):
    (tmp_path / "export.json").write_text("{")
    with staged(tmp_path, True) as folder:
        (folder / "x").write_text("1")
    assert names(tmp_path) == ["x"]

"""A file is there with all that was written to it, or as it was before."""

import os

import pytest
from etils import epath

from vlp_jax.files import is_remote, write_whole


@pytest.mark.parametrize("content", ["größer", "größer".encode()])
def test_a_file_and_its_folder_are_written(tmp_path, content):
    write_whole(tmp_path / "new" / "file", content)
    assert (tmp_path / "new" / "file").read_bytes() == "größer".encode()
    write_whole(str(tmp_path / "new" / "file"), "")
    assert (tmp_path / "new" / "file").read_bytes() == b""
    assert os.listdir(tmp_path / "new") == ["file"]


@pytest.mark.parametrize("fails", ["write_bytes", "replace"])
def test_what_fails_leaves_the_file_as_it_was_and_no_other(tmp_path, monkeypatch, fails):
    path = epath.Path(tmp_path) / "file.json"
    write_whole(path, "one")

    def full(self, *_):
        self.touch()  # what a full disk leaves
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(path), fails, full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, "two")
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["file.json"]


def test_what_is_remote():
    assert is_remote("gs://bucket/run") and is_remote(epath.Path("gs://bucket/run"))
    assert not is_remote("/data/run") and not is_remote("C:/run")

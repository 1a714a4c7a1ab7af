"""A file is there with all that was written to it, or as it was before; users' texts are read."""

import os

import pytest
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.files import is_remote, read_lines, read_text, text_lines, without_mark, write_whole


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


TEXT = "größer\r\n# note\n\n \u65e5\u672c \rend"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_users_text_may_begin_with_a_byte_order_mark(tmp_path, encoding, monkeypatch):
    path, remote = tmp_path / "text", epath.Path("gs://bucket/text")
    path.write_bytes(TEXT.encode(encoding))
    monkeypatch.setattr(type(remote), "read_bytes", lambda self: TEXT.encode(encoding))
    assert read_text(path) == read_text(remote) == TEXT
    assert read_lines("gs://bucket/text") == read_lines(path)
    assert list(text_lines(path)) == TEXT.splitlines(keepends=True)
    assert read_lines(path) == ("größer", "\u65e5\u672c", "end")
    assert without_mark(TEXT.encode(encoding), "x") == TEXT.encode()


@pytest.mark.parametrize("read", [read_text, read_lines, lambda path: list(text_lines(path))])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (TEXT.encode("utf-16"), "is UTF-16, not UTF-8; save it as UTF-8"),
        (b"\xfe\xff" + TEXT.encode("utf-16-be"), "is UTF-16, not UTF-8"),
        (TEXT.encode("utf-32"), "is UTF-32, not UTF-8"),
        ("one\ntwo".encode("utf-16-le"), "line 1, holds a zero byte: the file is UTF-16"),
        ("one\ntwo\ngrün".encode("latin-1"), "line 3, is not UTF-8"),
    ],
)
def test_a_text_in_another_encoding_is_named(tmp_path, read, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(path)
    assert f"{path}" in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_text_that_is_not_there_is_named(tmp_path):
    for read in (read_text, read_lines, lambda path: list(text_lines(path))):
        with pytest.raises(UserError, match=f"cannot read the file {tmp_path}/no: No such file"):
            read(tmp_path / "no")

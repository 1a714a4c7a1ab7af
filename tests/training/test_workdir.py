"""config.json of a run: who reads and who writes it, and what is said of one that is torn."""

from types import SimpleNamespace

import pytest
from etils import epath

from vlp_jax import config as config_lib
from vlp_jax import train
from vlp_jax.errors import UserError
from vlp_jax.parallel import agreement
from vlp_jax.training import workdir as workdir_lib


def test_a_write_that_fails_leaves_the_config_that_was_there(tmp_path, monkeypatch):
    workdir, config = epath.Path(tmp_path), config_lib.base()
    config.tokenizer = {}
    workdir_lib.prepare(workdir, config, None)
    config.seed = 7
    assert list(workdir_lib.changes(workdir, config)) == ["config.seed: 0 before, 7 now"]

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(type(workdir), "replace", full)
        with pytest.raises(OSError, match="No space"):
            workdir_lib.prepare(workdir, config, None)
    assert workdir_lib.load_config(workdir).seed == 0
    workdir_lib.prepare(workdir, config, None)
    assert workdir_lib.load_config(workdir).seed == 7


@pytest.mark.parametrize("content", [b"", b'{"seed": 1', b"\xff\xfe"])
def test_a_config_that_cannot_be_read_is_said_to_be_so(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for read in (
        workdir_lib.load_config,
        lambda folder: list(workdir_lib.changes(folder, config_lib.base())),
    ):
        with pytest.raises(UserError, match=r"config\.json is not JSON .* take it away"):
            read(epath.Path(tmp_path))


def test_the_first_process_alone_reads_the_config_that_it_is_about_to_write(tmp_path, monkeypatch):
    """Another would read it before, after or while it is written."""
    told, asked = [], []

    def on_first(function):
        asked.append(function)
        return ["config.seed: 0 before, 7 now"]

    def refuse(*_):
        raise AssertionError("read by another process than the first")

    monkeypatch.setattr(agreement, "on_first", on_first)
    monkeypatch.setattr(workdir_lib, "changes", refuse)
    monkeypatch.setattr(train.mesh_lib, "describe", lambda mesh: "a mesh")
    monkeypatch.setattr(train.startup, "describe_processes", lambda job: "")
    start = SimpleNamespace(announce=lambda workdir, tell: None)
    setup = SimpleNamespace(config=config_lib.base(), mesh=None)
    parts = SimpleNamespace(setup=setup, tokenizer=None, start=start)
    train.begin(parts, epath.Path(tmp_path), "alone", told.append)
    assert told == ["note: config.seed: 0 before, 7 now", "a mesh"]
    with pytest.raises(AssertionError, match="another process"):
        asked[0]()

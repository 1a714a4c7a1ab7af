"""A run's folder: where it may lie, and who reads and writes its config.json, also a torn one."""

import shutil
from types import SimpleNamespace

import helpers
import jax
import numpy as np
import pytest
from etils import epath

from configs import demo
from vlp_jax import config as config_lib
from vlp_jax import train
from vlp_jax.errors import UserError
from vlp_jax.parallel import agreement
from vlp_jax.training import workdir as workdir_lib
from vlp_jax.training.checkpoint import Checkpointer, absolute, choose_step
from vlp_jax.training.restore import SavedParameters
from vlp_jax.training.when import Units


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
        return ["note: config.seed: 0 before, 7 now"]

    def refuse(*_):
        raise AssertionError("read by another process than the first")

    monkeypatch.setattr(agreement, "on_first", on_first)
    monkeypatch.setattr(workdir_lib, "changes", refuse)
    monkeypatch.setattr(train.mesh_lib, "describe", lambda mesh: "a mesh")
    monkeypatch.setattr(train, "describe_run", lambda setup, first_step: f"from {first_step}")
    monkeypatch.setattr(train.startup, "describe_processes", lambda job: "")
    start = SimpleNamespace(announce=lambda workdir, tell: None)
    setup = SimpleNamespace(config=config_lib.base(), mesh=None, phases=(0,))
    parts = SimpleNamespace(setup=setup, tokenizer=None, start=start, notes=("take care",))
    train.begin(parts, epath.Path(tmp_path), "alone", 4, told.append)
    assert told == ["note: config.seed: 0 before, 7 now", "note: take care", "a mesh", "from 4"]
    with pytest.raises(AssertionError, match="another process"):
        asked[0]()


def test_a_longer_run_is_told_its_learning_rate_and_a_new_one_is_not(tmp_path):
    before, now = config_lib.base(), config_lib.base()
    before.tokenizer = now.tokenizer = {}
    before.duration, now.duration = (config_lib.duration(steps=n) for n in (100, 400))
    workdir_lib.prepare(epath.Path(tmp_path), before, None)
    units = Units(now.batch_size, None, 400)
    setup = SimpleNamespace(config=now, units=units, abstract=SimpleNamespace(params={}))
    note = "note: config.duration.steps: 100 before, 400 now"
    assert list(train.changed(setup, epath.Path(tmp_path), 0)) == [note]
    first, second = train.changed(setup, epath.Path(tmp_path), 90)
    assert first == note and second.startswith("warning: at step 90 the learning rate of ")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with a checkpoint of a state that lies on four devices, and the state."""
    workdir = tmp_path_factory.mktemp("saved") / "run"
    state = helpers.fresh(helpers.setup_on(helpers.tiny_config(), {"fsdp": 4}, 4))
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(3, state, {"position": 48})
    return workdir, state


def relative(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    return folder.name


def from_elsewhere(folder, monkeypatch):
    (elsewhere := folder.parent / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(elsewhere)
    return f"../../{folder.name}"


def by_a_link(folder, monkeypatch):
    (link := folder.parent / "link").symlink_to(folder)
    return link


def below_a_link(folder, monkeypatch):
    return by_a_link(folder.parent, monkeypatch) / folder.name


def named(name):
    def moved(folder, monkeypatch):
        (folder.parent / name).parent.mkdir(exist_ok=True)
        return str(folder.rename(folder.parent / name))

    return moved


PLACES = {
    "moved": named("other/run"),
    "relative": relative,
    "from another folder": from_elsewhere,
    "by a link": by_a_link,
    "below a link": below_a_link,
    "with a slash at its end": lambda folder, _: f"{folder}/",
    "with dots": lambda folder, _: f"{folder.parent}/./{folder.parent.name}/../{folder.name}",
    "with spaces": named("my first run (1)"),
    "not ASCII": named("läufe/Ünï-運転"),
    "as an address": named("run%20#1?x=1&y"),
    "with quotes": named("""it's "run" 1"""),
    "as a step": named("17"),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_wherever_its_folder_lies(saved, tmp_path, monkeypatch, place):
    """On other devices than before, bit for bit, and what it saves there lies beside the rest."""
    original, state = saved
    (tmp_path / "here").mkdir()
    folder = shutil.copytree(original, tmp_path / "here" / "run")
    workdir = PLACES[place](folder, monkeypatch)
    setup = helpers.setup_on(helpers.tiny_config(), {"replica": 2}, 2)
    with Checkpointer(workdir, keep_last=2) as checkpointer:
        assert checkpointer.check_fits(setup.abstract) == 3
        assert checkpointer.input_state(3) == {"position": 48}
        restored = checkpointer.restore(setup.abstract, 3)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), jax.device_get(state))
        checkpointer.save(4, restored, {"position": 64})
        checkpointer.finish(4)
        assert checkpointer.steps() == [3, 4]
    read = SavedParameters.of(absolute(workdir), choose_step(absolute(workdir), None)).read()
    np.testing.assert_array_equal(read["logit_scale"], jax.device_get(state.params["logit_scale"]))
    assert sorted(f.name for f in absolute(workdir).iterdir()) == ["checkpoints"]


def test_a_folder_without_its_checksums_is_read_wherever_it_lies(saved, tmp_path):
    folder = shutil.copytree(saved[0], tmp_path / "läufe (1) %20")
    (folder / "checkpoints" / "3" / "checksums.json").unlink()
    with Checkpointer(folder) as checkpointer:
        assert checkpointer.steps() == [3]


def test_a_config_straight_from_its_function_is_completed(tmp_path):
    config = demo.get_config()
    prepared = train.prepare_config(config, tmp_path / "run")
    assert prepared.objective.image.image_size == config.image_size
    assert "image_size" not in config.objective.image and "lanes" in prepared.data
    assert config_lib.to_json(prepared) == config_lib.to_json(config_lib.load("configs/demo.py"))


@pytest.mark.parametrize("name", ["run[1]", "[run", "a\\b"])
def test_a_path_where_checkpoints_could_not_be_read_is_refused(tmp_path, name):
    """Orbax writes checkpoints without their arrays there, and does not say so."""
    config = config_lib.base()
    for begin in (
        lambda: train.prepare_config(config, tmp_path / name / "run"),
        lambda: Checkpointer(tmp_path / name),
    ):
        with pytest.raises(UserError, match="in its path, where no checkpoint can be read"):
            begin()
    assert list(tmp_path.iterdir()) == []

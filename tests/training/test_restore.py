"""A checkpoint on another mesh, or of an older version, and its parameters alone."""

import re

import helpers
import jax
import numpy as np
import pytest
import tensorstore
from flax.traverse_util import unflatten_dict

from tools import stack_layers
from vlp_jax.errors import UserError
from vlp_jax.training import checkpoint
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.restore import SavedParameters, mismatch_report, shapes_of

ELSEWHERE = {"replica": 2, "fsdp": 2, "tensor": 2}
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


def setup_of(optimizer="adamw", sizes=None, ema=0.9, frozen=(), devices=8, **objective):
    config = helpers.tiny_config(**objective)
    config.optimizer.name = optimizer
    config.optimizer.ema_decay = ema
    config.optimizer.frozen = frozen
    return helpers.setup_on(config, sizes or {"replica": devices}, devices)


def random_state(setup, seed=0):
    """A state of random numbers; counts are 7, as all counts of one state are alike."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        floating = jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating)
        array = rng.standard_normal(leaf.shape) if floating else np.full(leaf.shape, 7)
        return jax.device_put(array.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(fill, setup.abstract)


def flat(tree):
    """path -> array on the host."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(jax.device_get(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def save(workdir, state, step=1):
    with Checkpointer(workdir) as checkpointer:
        checkpointer.save(step, state, {"position": 0})
        checkpointer.wait()


def restore(workdir, setup):
    """The state, and what was told."""
    told = []
    with Checkpointer(workdir, read_only=True, tell=told.append) as checkpointer:
        step = checkpointer.check_fits(setup.abstract)
        return checkpointer.restore(setup.abstract, step), told


def assert_laid_out(tree, abstract):
    for leaf, wanted in zip(jax.tree.leaves(tree), jax.tree.leaves(abstract), strict=True):
        assert (leaf.shape, leaf.dtype) == (wanted.shape, wanted.dtype)
        assert leaf.sharding == wanted.sharding


@pytest.mark.parametrize(("saved_depth", "depth"), [(2, 3), (3, 2)])
def test_other_depths_are_refused(saved_depth, depth):
    def shapes(depth):
        tower = {"width": 32, "depth": depth, "mlp_dim": 64, "heads": 2}
        return shapes_of(setup_of(text={"variant": "mu", **tower}).abstract)

    report = mismatch_report(shapes(saved_depth), shapes(depth))
    there, here = ((number, 2, 16) for number in (saved_depth, depth))
    path = "params/text/encoder/layers/attention/key/bias"
    assert f"{path} is {there} in the checkpoint and {here} in the model" in report


def test_a_loop_over_layers_and_layers_written_out_have_one_state(tmp_path):
    loop, written_out = setup_of(scan_layers=True), setup_of(scan_layers=False, sizes=ELSEWHERE)
    state = random_state(loop)
    save(tmp_path, state)
    restored, told = restore(tmp_path, written_out)
    assert told == []
    assert_laid_out(restored, written_out.abstract)
    jax.tree.map(np.testing.assert_array_equal, flat(restored), flat(state))


def apart(state):
    """A state as older versions kept it without a loop: path -> array, each layer by itself."""
    found = {}
    for path, array in flat(state).items():
        single = re.sub(r"inner_states/stack_of_2/", "inner_states/single/", path)
        if "/layers/" in path:
            for layer, own in enumerate(array):
                found[single.replace("/layers/", f"/layer_{layer}/")] = own
        elif single == path:  # the counts of steps of a group of layers were those of all
            found[path] = array
    return found


@pytest.fixture
def older(tmp_path):
    """A function that makes a workdir of an older version from a state."""

    def make(state):
        save(tmp_path / "old", unflatten_dict(state, sep="/"), step=4)
        (tmp_path / "old" / "config.json").write_text("{}")
        (tmp_path / "old" / "tensorboard" / "train").mkdir(parents=True)
        (tmp_path / "old" / "tensorboard" / "train" / "events").write_bytes(b"1")
        return tmp_path / "old"

    return make


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor", "muon", "lion"])
def test_layers_of_an_older_version_are_stacked(older, tmp_path, capsys, optimizer):
    setup, new = setup_of(optimizer), tmp_path / "new"
    state = random_state(setup)
    old = older(apart(state))
    with pytest.raises(UserError, match="keeps each layer by itself.*python -m tools.stack_layers"):
        restore(old, setup)
    with pytest.raises(UserError, match="keeps each layer by itself"):
        SavedParameters.of(checkpoint.absolute(old), 4)
    assert stack_layers.main([str(old), "--output", str(new)]) == 0
    assert "step 4: " in capsys.readouterr().out
    restored, told = restore(new, setup)
    assert told == []
    assert_laid_out(restored, setup.abstract)
    jax.tree.map(np.testing.assert_array_equal, flat(restored), flat(state))
    assert (new / "config.json").read_text() == "{}"
    assert (new / "tensorboard" / "train" / "events").read_bytes() == b"1"


def test_what_cannot_be_stacked_is_named(older, tmp_path, capsys):
    setup = setup_of()
    state = apart(random_state(setup))
    moments = [path for path in state if path.startswith("opt_state/") and "/layer_0/" in path]
    old = older({path: array for path, array in state.items() if path not in moments})
    for output, words in ((tmp_path / "new", "is of the layers [1] alone"), (old, "exists; give")):
        assert stack_layers.main([str(old), "--output", str(output)]) == 2
        assert words in capsys.readouterr().err
    assert moments and not (tmp_path / "new").exists()
    save(tmp_path / "today", random_state(setup))
    assert stack_layers.main([str(tmp_path / "today"), "--output", str(tmp_path / "other")]) == 2
    assert "are stacked already; it can be used as it is" in capsys.readouterr().err


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A workdir with a checkpoint by AdamW with an average, its setup and its state."""
    workdir = tmp_path_factory.mktemp("averaged")
    setup = setup_of(image={"variant": "mu/8", "image_size": 16, "width": 256, "depth": 2})
    state = random_state(setup)
    save(workdir, state, step=5)
    return workdir, setup, state


def bytes_read(function):
    """What `function` gives, and how many bytes TensorStore has read from files meanwhile."""

    def count():
        (metric,) = tensorstore.experimental_collect_matching_metrics(
            BYTES_READ, include_zero_metrics=True
        )
        return metric["values"][0]["value"]

    before = count()
    result = function()
    return result, count() - before


@pytest.mark.parametrize(
    ("choice", "part"), [("auto", "ema"), ("ema", "ema"), ("params", "params")]
)
def test_parameters_alone_come_onto_any_mesh_whatever_the_optimizer(averaged, choice, part):
    workdir, setup, state = averaged
    image = {"variant": "mu/8", "image_size": 16, "width": 256, "depth": 2}
    other = setup_of("adafactor", ELSEWHERE, ema=0, image=image)
    saved = SavedParameters.of(checkpoint.absolute(workdir), 5, choice)
    loaded, read = bytes_read(lambda: saved.load(other.abstract.params))
    assert (loaded.step, loaded.part) == (5, part)
    assert_laid_out(loaded.params, other.abstract.params)
    wanted = flat(getattr(state, part))
    jax.tree.map(np.testing.assert_array_equal, flat(loaded.params), wanted)
    jax.tree.map(np.testing.assert_array_equal, saved.read(), wanted)
    size = sum(array.nbytes for array in wanted.values())
    # The index of the files counts as well, some of it more than once, and on a busy machine
    # perhaps more often: the lesser of two counts.
    read = min(read, bytes_read(lambda: saved.load(other.abstract.params))[1])
    assert 0.8 * size < read < 2 * size
    _, all_read = bytes_read(lambda: restore(workdir, setup))
    assert all_read > 3 * size  # parameters, average and two moments


def test_the_whole_state_of_another_optimizer_is_refused(averaged):
    workdir, setup, _ = averaged
    image = {"variant": "mu/8", "image_size": 16, "width": 256, "depth": 2}
    for name, ema in (("lion", 0.9), ("adamw", 0)):
        with pytest.raises(UserError, match="was written with another config.optimizer") as raised:
            restore(workdir, setup_of(name, ema=ema, image=image))
        assert "opt_state/" not in str(raised.value)


def test_an_average_that_is_not_there_is_refused(tmp_path):
    setup = setup_of(ema=0)
    save(tmp_path, random_state(setup))
    workdir = checkpoint.absolute(tmp_path)
    assert SavedParameters.of(workdir, 1).part == "params"
    with pytest.raises(UserError, match="holds no averaged parameters"):
        SavedParameters.of(workdir, 1, "ema")
    assert SavedParameters.of(workdir, 1).shapes == shapes_of(setup.abstract.params)


def test_parameters_of_another_model_are_refused(averaged):
    workdir, _, _ = averaged
    saved = SavedParameters.of(checkpoint.absolute(workdir), 5)
    with pytest.raises(UserError, match=r"key/bias is \(2, 2, 128\) in the checkpoint and"):
        saved.load(setup_of().abstract.params)

"""A checkpoint in another layout of the layers, and its parameters alone."""

import re

import helpers
import jax
import numpy as np
import pytest
import tensorstore

from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training import checkpoint, layer_layout
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.restore import SavedParameters, mismatch_report, shapes_of

ELSEWHERE = {"replica": 2, "fsdp": 2, "tensor": 2}
BYTES_READ = "/tensorstore/kvstore/file/bytes_read"


def setup_of(scan, optimizer="adamw", sizes=None, ema=0.9, frozen=(), devices=8, **objective):
    config = helpers.tiny_config(scan_layers=scan, **objective)
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


@pytest.mark.parametrize(
    "optimizer",
    ["adamw", *(pytest.param(o, marks=pytest.mark.slow) for o in ("adafactor", "muon", "lion"))],
)
def test_stacked_layers_are_taken_apart_and_stacked_again(tmp_path, optimizer):
    stacked, separate = setup_of(True, optimizer), setup_of(False, optimizer, ELSEWHERE)
    state = random_state(stacked)
    save(tmp_path / "stacked", state)
    apart, told = restore(tmp_path / "stacked", separate)
    assert told[0].startswith("note: the layout of the layers is converted: stacked layers taken")
    assert_laid_out(apart, separate.abstract)
    before, after, layers = flat(state), flat(apart), 0
    for path, array in after.items():
        match = re.search("layer_([01])/", path)
        if match:
            source = path.replace(f"layer_{match[1]}/", "layers/")
            source = source.replace("inner_states/single", "inner_states/stack_of_2")
            whole = before[source if source in before else path]
            np.testing.assert_array_equal(array, whole[int(match[1])], path)
            layers += 1
        else:
            np.testing.assert_array_equal(array, before[path], path)
    assert layers >= 2 * 2 * 2 * 16 * (2 if optimizer == "lion" else 3) / 2
    save(tmp_path / "separate", apart)
    again, told = restore(tmp_path / "separate", stacked)
    assert told[0].startswith("note: the layout of the layers is converted: separate layers stac")
    assert_laid_out(again, stacked.abstract)
    jax.tree.map(np.testing.assert_array_equal, flat(again), before)


def test_a_layout_that_is_the_same_is_not_talked_about(tmp_path):
    setup = setup_of(False)
    state = random_state(setup)
    save(tmp_path, state)
    restored, told = restore(tmp_path, setup)
    assert told == []
    jax.tree.map(np.testing.assert_array_equal, flat(restored), flat(state))


def go_on(setup, state, first, last):
    """The losses of steps `first` to `last`."""
    step, losses = helpers.compiled(setup), []
    for batch in list(helpers.batches(last))[first:]:
        state, metrics = step(state, put_batch(batch, setup.mesh))
        losses.append(float(metrics["loss"][0]) / float(metrics["loss"][1]))
    return losses


def check_training_goes_on(tmp_path, optimizer, scan):
    setup = setup_of(scan, optimizer, devices=1)
    other = setup_of(not scan, optimizer, devices=1)
    state, _ = helpers.train(setup, 4)
    save(tmp_path, state, step=4)
    converted, _ = restore(tmp_path, other)
    wanted = go_on(setup, state, 4, 10)
    np.testing.assert_allclose(go_on(other, converted, 4, 10), wanted, rtol=1e-4)
    # Without the moments of the optimizer the losses are others.
    fresh = other.optimizer.init(converted.params)
    restarted, _ = restore(tmp_path, other)
    lost = restarted.replace(opt_state=fresh)
    assert np.abs(np.subtract(go_on(other, lost, 4, 10), wanted)).max() > 1e-3


@pytest.mark.slow
def test_training_goes_on_after_a_conversion(tmp_path):
    check_training_goes_on(tmp_path, "adamw", scan=True)


@pytest.mark.slow
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "adafactor", "lion"])
def test_training_goes_on_with_every_optimizer(tmp_path, optimizer, scan):
    check_training_goes_on(tmp_path, optimizer, scan)


@pytest.mark.parametrize("saved_stacked", [True, False])
@pytest.mark.parametrize(("saved_depth", "depth"), [(2, 3), (3, 2)])
def test_other_depths_are_refused_in_another_layout_too(saved_stacked, saved_depth, depth):
    def abstract(stacked, depth):
        tower = {"width": 32, "depth": depth, "mlp_dim": 64, "heads": 2}
        return shapes_of(setup_of(stacked, text={"variant": "mu", **tower}).abstract)

    saved, wanted = abstract(saved_stacked, saved_depth), abstract(not saved_stacked, depth)
    origins = layer_layout.find_origins(saved, wanted)
    report = mismatch_report(layer_layout.converted_shapes(saved, origins), wanted)
    if saved_stacked:
        shape = "(2, 16)"
        there = (shape, "absent") if depth == 2 else ("absent", shape)
        path = "params/text/encoder/layer_2/attention/key/bias"
    else:
        there = (f"({saved_depth}, 2, 16)", f"({depth}, 2, 16)")
        path = "params/text/encoder/layers/attention/key/bias"
    assert f"{path} is {there[0]} in the checkpoint and {there[1]} in the model" in report
    same = abstract(not saved_stacked, saved_depth)
    origins = layer_layout.find_origins(saved, same)
    assert mismatch_report(layer_layout.converted_shapes(saved, origins), same) == ""


def test_a_layer_that_alone_is_frozen_has_no_state_to_be_stacked(tmp_path):
    frozen = setup_of(False, frozen=("image/encoder/layer_0/.*",))
    save(tmp_path, random_state(frozen))
    with pytest.raises(UserError) as error:
        restore(tmp_path, setup_of(True))
    message = str(error.value)
    assert "the optimizer's state cannot be converted: opt_state/1/0/mu/image/encoder" in message
    assert "config.init_from.source" in message and "\n" not in message


def test_what_is_nowhere_has_no_origin():
    saved = {"a/layers/w": (2, 3), "b/layer_0/w": (4,), "b/layer_2/w": (4,)}
    wanted = {"a/layer_1/w": (3,), "a/layer_2/w": (3,), "b/layers/w": (3, 4), "c": ()}
    origins = layer_layout.find_origins(saved, wanted)
    assert list(origins) == ["a/layer_1/w"]
    assert origins["a/layer_1/w"].shape(saved) == (3,)


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    """A workdir with a checkpoint by AdamW with an average, its setup and its state."""
    workdir = tmp_path_factory.mktemp("averaged")
    setup = setup_of(True, image={"variant": "mu/8", "image_size": 16, "width": 256, "depth": 2})
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
    other = setup_of(False, "adafactor", ELSEWHERE, ema=0, image=image)
    saved = SavedParameters.of(checkpoint.absolute(workdir), 5, choice)
    loaded, read = bytes_read(lambda: saved.load(other.abstract.params))
    assert (loaded.step, loaded.part) == (5, part)
    assert_laid_out(loaded.params, other.abstract.params)
    stacked = layer_layout.stack_layers(flat(loaded.params), np.stack)
    wanted = flat(getattr(state, part))
    jax.tree.map(np.testing.assert_array_equal, stacked, wanted)
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
            restore(workdir, setup_of(True, name, ema=ema, image=image))
        assert "opt_state/" not in str(raised.value)


def test_an_average_that_is_not_there_is_refused(tmp_path):
    setup = setup_of(True, ema=0)
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
        saved.load(setup_of(True).abstract.params)

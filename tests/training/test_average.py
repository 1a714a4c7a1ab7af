"""The moving average of all or some of the parameters, with a decay that may rise."""

import helpers
import jax
import numpy as np
import pytest
from etils import epath

from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training import param_groups
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.restore import SavedParameters
from vlp_jax.training.step_rules import Average
from vlp_jax.training.when import Units

EIGHT = ({"replica": 2, "fsdp": 4}, 8)


def config_of(**optimizer):
    config = helpers.tiny_config(**optimizer.pop("objective", {}))
    config.optimizer.update(optimizer)
    return config


def flat(tree):
    return param_groups.flatten(jax.device_get(tree))


def history(setup, count):
    """The states before and after each of `count` steps, on the host."""
    state, step = helpers.fresh(setup), helpers.compiled(setup)
    states = [jax.device_get(state)]
    for batch in helpers.batches(count):
        state, _ = step(state, put_batch(batch, setup.mesh))
        states.append(jax.device_get(state))
    return state, states


@pytest.mark.parametrize("final", [pytest.param(None, marks=pytest.mark.slow), 0.9])
def test_it_follows_the_parameters_by_its_decay(final):
    config = config_of(ema_decay=0.6, ema_final_decay=final, learning_rate=0.1)
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    _, states = history(setup, 3)
    path = "image/encoder/layers/mlp/up/kernel"
    expected = np.float64(flat(states[0].params)[path])
    for step, state in enumerate(states[1:]):
        rise = 0 if final is None else (1 - np.cos(np.pi * step / 20)) / 2
        decay = 0.6 + rise * ((final or 0.6) - 0.6)
        expected = decay * expected + (1 - decay) * np.float64(flat(state.params)[path])
        np.testing.assert_allclose(flat(state.ema)[path], expected, rtol=1e-4, atol=1e-6)
    assert np.abs(expected - flat(states[-1].params)[path]).max() > 1e-3


def test_a_decay_rises_to_the_end_of_the_run_and_no_further():
    average = Average(0.9, 1.0, total_steps=100)
    assert [float(average.decay_at(step)) for step in (0, 100, 300)] == pytest.approx([0.9, 1, 1])
    assert float(average.decay_at(50)) == pytest.approx(0.95)
    assert Average(0.9).decay_at(7) == 0.9


@pytest.mark.parametrize(
    "frozen", [pytest.param((), marks=pytest.mark.slow), ("image/encoder/norm/.*",)]
)
def test_some_of_the_parameters_alone(frozen, tmp_path):
    config = config_of(ema_decay=0.5, ema_of=("image/.*",), learning_rate=0.1, frozen=frozen)
    setup = helpers.setup_on(config, *EIGHT)
    state, states = history(setup, 2)
    first, last = states[0], states[-1]
    averaged = {path for path in flat(last.params) if path.startswith("image/")}
    assert set(flat(last.ema)) == averaged
    evaluated = flat(last.eval_params)
    assert set(evaluated) == set(flat(last.params))
    for path, value in evaluated.items():
        same = np.array_equal(value, flat(last.params)[path])
        is_frozen = path.startswith("image/encoder/norm/") and bool(frozen)
        moved = not np.array_equal(flat(first.params)[path], flat(last.params)[path])
        assert moved != is_frozen
        assert same == (path not in averaged or is_frozen), path
    for part, leaf in flat(setup.abstract.ema).items():
        assert leaf.sharding == param_groups.flatten(setup.abstract.params)[part].sharding
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, input_state={"position": 32})
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(setup.abstract, 2)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), last)
    saved = SavedParameters.of(epath.Path(tmp_path), 2)
    assert saved.part == "ema" and set(saved.shapes) == set(evaluated)
    read, loaded = saved.read(), flat(saved.load(setup.abstract.params).params)
    for path, value in evaluated.items():
        np.testing.assert_array_equal(read[path], value)
        np.testing.assert_array_equal(loaded[path], value)
    plain = SavedParameters.of(epath.Path(tmp_path), 2, "params").read()
    assert not np.array_equal(plain["image/pooling/probe"], evaluated["image/pooling/probe"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), not 1.0"),
        (
            {"ema_decay": 0.9, "ema_final_decay": 0.5},
            r"must be in \[ema_decay, 1\]",
        ),
        ({"ema_final_decay": 0.5}, "ema_final_decay needs an ema_decay above 0"),
        ({"ema_decay": 0.9, "ema_of": ("imgae/.*",)}, "'imgae/.*' is the path of no parameter"),
        ({"ema_decay": 0.9, "ema_of": ("(",)}, "ema_of: '\\(' is no regular expression"),
    ],
)
def test_what_cannot_be_averaged(change, message):
    with pytest.raises(UserError, match=message):
        helpers.setup_on(config_of(**change), {"replica": 1}, 1)


def test_without_it_there_is_nothing():
    average = Average.of(config_of().optimizer, Units(16, None, 20))
    assert average.init({"a": np.ones(3)}) == {} and average({}, {"a": np.ones(3)}, 0) == {}

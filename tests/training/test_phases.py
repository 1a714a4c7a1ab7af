"""Losses that begin late, end early or rise: what is computed when, and that resuming is exact."""

import dataclasses
import types

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vlp_jax.errors import UserError
from vlp_jax.objectives.weight import Weight
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training import param_groups
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.setup import Phases, compile_phases

BEGIN, STEPS = 3, 6
TOWER = {"width": 32, "depth": 1, "mlp_dim": 64, "heads": 2}
ONE, EIGHT = ({"replica": 1}, 1), ({"replica": 2, "fsdp": 4}, 8)


def config_of(weight=None, **guard):
    """Pairs, and from step `BEGIN` on a masked autoencoder of the same image tower."""
    config = helpers.tiny_config()
    pairs = config.objective
    pairs.image.update({"class_token": True, "position": "sincos"})
    image = {key: value for key, value in pairs.image.items() if key != "pooling"}
    masked = {
        "name": "masked_autoencoding",
        "image": image,
        "decoder": TOWER,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "weight": weight or {"value": 0.5, "begin": {"percent": 50}},
    }
    parts = {"pairs": pairs, "masked": masked}
    config.objective = ConfigDict({"name": "composite", "parts": parts})
    config.duration.steps = STEPS
    config.optimizer.weight_decay = 0.1
    config.guard.update(guard)
    return config


def leaping():
    """A loss that begins late and is much larger, with the rule about spikes."""
    weight = {"value": 1e4, "begin": {"steps": BEGIN}}
    return config_of(weight, spike_deviations=3.0, spike_window=2)


def run(setup, state, first, last):
    """The state before batch `last`, the metrics of each step from batch `first` on, and the
    phases that have begun."""
    begun, history = [], []
    phase_of = {flops / helpers.BATCH: phase for phase, flops in setup.flops_by_phase.items()}
    clock = types.SimpleNamespace(count_flops=lambda flops: begun.append(phase_of[flops]))
    programs = helpers.once(setup, "_phases", lambda: compile_phases(setup, 0))
    program_of = Phases(setup, programs, clock, begun.append)
    for step, batch in enumerate(helpers.batches(STEPS)):
        if first <= step < last:
            state, metrics = program_of(step)(state, put_batch(batch, setup.mesh))
            history.append(metrics.fetch())
    return state, history, begun


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def own(tree):
    """The parameters that the masked autoencoder alone has."""
    flat = param_groups.flatten(jax.device_get(tree))
    return {path: leaf for path, leaf in flat.items() if path.startswith("decoder/")}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(ONE, marks=pytest.mark.slow), EIGHT],
    ids=["one device", "eight devices"],
)
def test_a_loss_that_begins_late_rests_until_then_and_resumes_bit_for_bit(layout, tmp_path):
    setup = helpers.setup_on(leaping(), *layout)
    assert setup.phases == (0, BEGIN) and setup.costliest == BEGIN
    first = jax.device_get(setup.fresh_state())
    late, history, begun = run(setup, setup.fresh_state(), 0, BEGIN)
    assert begun == [0]
    assert all("masked/loss" not in metrics for metrics in history)
    # Neither weight decay nor the optimizer has touched what no loss has read.
    assert own(first.params) and own(late.params).keys() == own(first.params).keys()
    assert_same(own(late.params), own(first.params))
    moments = [leaf for path, leaf in jax.tree_util.tree_leaves_with_path(late.opt_state)
               if "decoder" in jax.tree_util.keystr(path)]  # fmt: skip
    assert moments and not any(np.any(jax.device_get(leaf)) for leaf in moments)
    kernel = lambda state: state.params["image"]["patch_embedding"]["projection"]["kernel"]  # noqa: E731
    assert np.any(jax.device_get(kernel(late)) != kernel(first))

    with Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save(BEGIN, late, {})
        checkpointer.finish(BEGIN)
        restored = checkpointer.restore(setup.abstract, BEGIN)
    whole, through, begun = run(setup, setup.fresh_state(), 0, STEPS)
    told = f"step {BEGIN}  the loss is now: masked and pairs"
    assert begun == [0, BEGIN, told]
    resumed, after, begun = run(setup, restored, BEGIN, STEPS)
    assert begun == [BEGIN, told]
    assert_same(resumed, whole)
    assert after == through[BEGIN:]
    for metrics in after:
        total, pairs, masked = (
            metrics[name][0] / metrics[name][1] for name in ("loss", "pairs/loss", "masked/loss")
        )
        assert total == pytest.approx(pairs + 1e4 * masked, rel=1e-5)
    assert any(np.any(leaf != own(first.params)[path]) for path, leaf in own(whole.params).items())
    # The guard does not take the beginning of the loss for a spike.
    assert [metrics["skipped"][0] for metrics in through] == [0] * STEPS
    assert through[BEGIN]["loss"][0] > 100 * through[BEGIN - 1]["loss"][0]


def test_steps_before_it_begins_cost_what_they_cost_without_it():
    config = leaping()
    alone = config.copy_and_resolve_references()
    alone.objective = config.objective.parts.pairs
    setup, without = (helpers.setup_on(one, *EIGHT) for one in (config, alone))
    flops = lambda program: program.program.cost_analysis()["flops"]  # noqa: E731
    programs = helpers.once(setup, "_phases", lambda: compile_phases(setup, 0))
    before, later = (flops(programs[phase]) for phase in setup.phases)
    ratio = before / flops(without.compile())
    assert ratio < 1.01 and later > 1.1 * before
    assert setup.flops_by_phase[0] == without.forward_flops
    assert setup.forward_flops == setup.flops_by_phase[BEGIN]


def test_the_program_of_a_phase_that_is_over_is_not_compiled():
    setup = helpers.setup_on(config_of(), *ONE)
    setup = dataclasses.replace(setup, config=setup.config)
    compiled = []
    object.__setattr__(setup, "compile", compiled.append)
    assert list(compile_phases(setup, BEGIN)) == [BEGIN] == compiled


def test_a_weight_rises_in_a_line_and_ends():
    steps = lambda duration, where: duration["steps"]  # noqa: E731
    given = {"value": 2.0, "begin": {"steps": 4}, "ramp": {"steps": 4}, "end": {"steps": 10}}
    weight = Weight.of(given, steps, "w")
    assert [weight.is_on(step) for step in (3, 4, 9, 10)] == [False, True, True, False]
    rising = jax.jit(jax.vmap(weight.at))(jnp.arange(4, 10))
    np.testing.assert_allclose(rising, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert Weight.of(given, None, "w") == Weight(2.0)  # where nothing is trained
    assert Weight.of(3, steps, "w").at(0) == 3.0
    assert weight * Weight(0.5) == Weight(0.5) * weight == dataclasses.replace(weight, value=1.0)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ({"begin": {"steps": STEPS}}, r"parts.masked.weight is 0 in all of the 6 steps"),
        ({"end": {"steps": 0}}, "ends at step 0, and begins at step 0"),
        ({"begins": {"steps": 3}}, "begin"),
        ({"begin": {"steps": 3, "percent": 3}}, "needs exactly one of"),
        ({"value": -1.0}, "must be positive"),
    ],
)
def test_bad_weights(weight, message):
    with pytest.raises(UserError, match=message):
        helpers.setup_on(config_of(weight), *ONE)


def test_all_weights_0_at_some_step():
    config = config_of({"begin": {"steps": 4}})
    config.objective.parts.pairs.weight = ConfigDict({"end": {"steps": 2}})
    with pytest.raises(UserError, match="the weights of all parts are 0 at step 2"):
        helpers.setup_on(config, *ONE)


def test_two_weights_that_change_are_not_multiplied():
    config = config_of()
    inner = config.objective
    inner.weight = ConfigDict({"ramp": {"steps": 2}})
    config.objective = ConfigDict({"name": "composite", "parts": {"inner": inner}})
    with pytest.raises(UserError, match="both have a weight that changes"):
        helpers.setup_on(config, *ONE)

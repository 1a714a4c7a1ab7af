"""Optimizer, schedules, durations, state and step."""

import dataclasses
import inspect
import types
from unittest.mock import MagicMock

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax import config as config_lib
from vlp_jax.errors import NoScores, NotFinite, UserError
from vlp_jax.evaluators.base import Scores
from vlp_jax.objectives.base import Context
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.loop import Evaluation, Loop
from vlp_jax.training.monitor import Monitor
from vlp_jax.training.optimizer import (
    decay_mask,
    learning_rate_jumps,
    make_optimizer,
    make_schedule,
)
from vlp_jax.training.state import key_for
from vlp_jax.training.when import EveryMinutes, EverySteps, StepsOrMinutes, Units

UNITS = Units(batch_size=100, epoch_examples=1050, total_steps=1000)


def optimizer_config(**changes):
    config = config_lib.base().optimizer
    for key, value in changes.items():
        config[key] = value
    return config


@pytest.mark.parametrize(
    ("duration", "steps"),
    [({"steps": 7}, 7), ({"examples": 101}, 2), ({"epochs": 2.0}, 21), ({"percent": 0.25}, 3)],
)
def test_durations_round_up_to_steps(duration, steps):
    assert UNITS.steps(config_lib.duration(**duration), "here") == steps


@pytest.mark.parametrize(
    ("duration", "message"),
    [
        ({}, "needs exactly one of steps, examples, epochs, percent; it sets none"),
        ({"steps": 1, "epochs": 2.0}, "clear one with --here.steps=None"),
        ({"steps": -1}, "here.steps is negative"),
    ],
)
def test_bad_durations(duration, message):
    with pytest.raises(UserError, match=message):
        UNITS.steps(config_lib.duration(**duration), "here")


def test_epochs_of_data_without_a_size():
    with pytest.raises(UserError, match="no known size"):
        Units(10, None).steps(config_lib.duration(epochs=1.0), "config.duration")


def test_every_steps():
    when = EverySteps(4, last=10)
    assert [step for step in range(11) if when(step)] == [4, 8, 10]
    assert [step for step in range(11) if EverySteps(0, last=10)(step)] == [10]


def test_every_so_many_minutes_where_the_clock_is_looked_at():
    now, asked = [0.0], []

    def agree(due):
        asked.append(due)
        return due

    when = EveryMinutes(1.0, lambda step: step % 5 == 0, agree, time_fn=lambda: now[0])
    due = []
    for step in range(40):
        now[0] = 10.0 * step  # six steps a minute
        if when(step):
            due.append(step)
            when.reset()
    assert due == [10, 20, 30]  # at 60 s nobody looks; then a minute after each
    assert len(asked) == 8  # no message but at the steps that are looked at
    never = EveryMinutes(0.0, lambda step: True, agree, time_fn=lambda: 1e9 * now[0])
    assert not any(never(step) for step in range(10)) and len(asked) == 8


def test_the_clock_of_the_first_process_decides():
    now = [0.0]
    slow = EveryMinutes(1.0, lambda step: True, lambda due: True, time_fn=lambda: now[0])
    assert slow(1)  # its own minute is not over


def test_a_save_by_steps_begins_a_new_period_of_minutes():
    now = [0.0]
    minutes = EveryMinutes(1.0, lambda step: True, lambda due: due, time_fn=lambda: now[0])
    when, due = StepsOrMinutes(EverySteps(10, last=100), minutes), []
    for step in range(1, 30):
        now[0] = 8.0 * step
        due += [step] if when(step) else []
    assert due == [8, 10, 18, 20, 28]


def schedule_values(name, **changes):
    schedule = make_schedule(optimizer_config(schedule=name, learning_rate=2.0, **changes), UNITS)
    return np.asarray(schedule(np.arange(1001)))


@pytest.mark.parametrize("name", ["cosine", "rsqrt", "linear", "constant"])
def test_schedules_rise_linearly_to_the_peak(name):
    values = schedule_values(name, warmup=config_lib.duration(steps=50))
    np.testing.assert_allclose(values[:50], 2.0 * np.arange(1, 51) / 50, rtol=1e-6)
    assert values.argmax() in (49, 50)
    assert (np.diff(values[50:]) <= 1e-9).all()


def test_cosine_equals_optax():
    ours = schedule_values("cosine", warmup=config_lib.duration(steps=0))
    expected = optax.cosine_decay_schedule(2.0, 1000)(np.arange(1001))
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_rsqrt_and_its_cooldown():
    values = schedule_values(
        "rsqrt",
        warmup=config_lib.duration(steps=100),
        cooldown=config_lib.duration(steps=200),
    )
    np.testing.assert_allclose(values[400], 2.0 * 0.5, rtol=1e-6)
    np.testing.assert_allclose(values[900], 2.0 / 3 * 0.5, rtol=1e-6)
    assert values[1000] == 0


PARAMS = {
    tower: {"encoder": {"layers": {"kernel": np.zeros((2, 4, 4))}}} for tower in ("image", "text")
}
# A run of 100 steps goes on: name -> (changes of the config, the step, what leaps).
LEAPS = {
    "longer": ({"duration.steps": 400}, 90, {"learning_rate"}),
    "longer, from its end": ({"duration.steps": 400}, 100, {"learning_rate"}),
    "shorter": ({"duration.steps": 60}, 50, {"learning_rate"}),
    "a little longer": ({"duration.steps": 101}, 50, set()),
    "longer, early": ({"duration.steps": 110}, 20, set()),
    "as long in examples": ({"duration.steps": None, "duration.examples": 10_000}, 50, set()),
    "longer in epochs": ({"duration.steps": None, "duration.epochs": 40.0}, 50, {"learning_rate"}),
    "peak": ({"optimizer.learning_rate": 2e-3}, 50, {"learning_rate"}),
    "peak by a tenth": ({"optimizer.learning_rate": 1.1e-3}, 50, set()),
    "schedule": ({"optimizer.schedule": "constant"}, 50, {"learning_rate"}),
    "warm-up": ({"optimizer.warmup.percent": 40.0}, 20, {"learning_rate"}),
    "cool-down": ({"optimizer.cooldown.percent": 40.0}, 80, {"learning_rate"}),
    "another key": ({"optimizer.weight_decay": 0.3, "seed": 3}, 50, set()),
    "layers": ({"optimizer.layer_decay.image": 0.8}, 50, {"layer_decay.image"}),
    "muon": ({"optimizer.muon.learning_rate": 0.04}, 50, {"muon.learning_rate"}),
}


@pytest.mark.parametrize("name", LEAPS)
def test_learning_rates_that_leap_on_resuming_are_told(name):
    """By how much, as optax has it for cosine, and which rate goes on from where it was."""
    changes, step, leaping = LEAPS[name]
    before = config_lib.base()
    before.duration = config_lib.duration(steps=100)
    before.optimizer.name = "muon" if name == "muon" else "adamw"
    now = before.copy_and_resolve_references()
    now.update_from_flattened_dict(changes)
    units = dataclasses.replace(UNITS, total_steps=None)
    units = dataclasses.replace(units, total_steps=units.steps(now.duration, "config.duration"))
    lines = list(learning_rate_jumps(before, now, units, step, PARAMS))
    assert {line.partition("config.optimizer.")[2].partition(" ")[0] for line in lines} == leaping
    if name == "longer, from its end":
        [line] = lines

        def cosine(total, step):
            warmup = total // 20
            return float(optax.cosine_decay_schedule(1e-3, total - warmup)(step - warmup))

        was, is_now = cosine(100, 99), cosine(400, 100)
        assert f"leaps from {was:.3g} to {is_now:.3g}, {is_now / was:.3g} times as high" in line
        assert "of 100 steps and now of 400" in line
    if name == "shorter":
        now.optimizer.learning_rate = float(lines[0].partition("learning_rate=")[2].split()[0])
        assert not list(learning_rate_jumps(before, now, units, step, PARAMS))


def test_a_run_whose_length_is_not_known_any_more_is_resumed_without_a_word():
    before, units = config_lib.base(), Units(10, None, 100)
    before.duration = config_lib.duration(epochs=3.0)
    assert not list(learning_rate_jumps(before, before, units, 5, PARAMS))


def test_warmup_longer_than_the_run():
    with pytest.raises(UserError, match="longer than the run"):
        make_schedule(optimizer_config(warmup=config_lib.duration(steps=1001)), UNITS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "adamwx"}, "did you mean 'adamw'"),
        ({"schedule": "cosin"}, "did you mean 'cosine'"),
        ({"learning_rate": -1.0}, "negative"),
        ({"b2": 1.0}, r"must be in \[0, 1\)"),
    ],
)
def test_bad_optimizers(changes, message):
    with pytest.raises(UserError, match=message):
        make_optimizer(optimizer_config(**changes), UNITS)


def test_decay_pulls_matrices_and_leaves_norms_biases_and_the_logit_scale():
    setup = helpers.setup_on(helpers.tiny_config(loss="sigmoid"), {"replica": 1}, 1)
    mask = decay_mask(setup.abstract.params, setup.config.optimizer.no_decay)
    flat = {
        jax.tree_util.keystr(path, simple=True, separator="/"): value
        for path, value in jax.tree_util.tree_leaves_with_path(mask)
    }
    assert flat["image/encoder/layers/mlp/up/kernel"]
    assert flat["text/token_embedding/embedding"]
    assert not flat["image/encoder/layers/mlp/up/bias"]  # stacked, so it has two dimensions
    assert not flat["image/encoder/layers/norm_mlp/scale"]
    assert not flat["logit_scale"] and not flat["logit_bias"]


def test_step_equals_optax_by_hand():
    config = helpers.tiny_config()
    config.optimizer.clip_norm = 0.01  # small, so that clipping takes part
    config.optimizer.ema_decay = 0.9
    setup = helpers.setup_on(config, {"replica": 1}, 1)
    state = helpers.fresh(setup)
    params = jax.device_get(state.params)
    batch = next(helpers.batches(1))
    after, metrics = helpers.compiled(setup)(state, put_batch(batch, setup.mesh))

    def loss(p):
        return setup.objective.loss(p, batch, Context(jax.random.key(0)))[0]

    value, grads = jax.jit(jax.value_and_grad(loss))(params)
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    assert norm > 0.01
    rate = float(setup.schedule(0))
    mask = decay_mask(params, config.optimizer.no_decay)

    def updated(p, g, decays):  # Adam's first step: m / sqrt(v) is g / |g|
        g = g * 0.01 / norm
        direction = g / (np.abs(g) + config.optimizer.eps)
        return p - rate * (direction + decays * config.optimizer.weight_decay * p)

    expected = jax.tree.map(updated, params, grads, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after.params, expected)
    jax.tree.map(
        lambda e, p, q: np.testing.assert_allclose(e, 0.9 * p + 0.1 * q, atol=1e-6),
        after.ema,
        params,
        expected,
    )
    np.testing.assert_allclose(metrics["loss"][0] / metrics["loss"][1], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-4)
    np.testing.assert_allclose(metrics["learning_rate"][0], rate, rtol=1e-6)
    assert after.eval_params is after.ema and int(after.step) == 1


def test_keys_differ_by_seed_step_and_purpose():
    keys = {
        tuple(np.asarray(jax.random.key_data(key_for(*arguments))).tolist())
        for arguments in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1)]
    }
    assert len(keys) == 5


def test_initial_parameters_do_not_depend_on_the_mesh():
    config = helpers.tiny_config()
    one = helpers.fresh(helpers.setup_on(config, {"replica": 1}, 1))
    many = helpers.fresh(helpers.setup_on(config, {"replica": 2, "fsdp": 4}))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(one), jax.device_get(many))


def test_seed_changes_the_parameters():
    config = helpers.tiny_config()
    first = helpers.fresh(helpers.setup_on(config, {"replica": 1}, 1))
    config.seed = 1
    second = helpers.fresh(helpers.setup_on(config, {"replica": 1}, 1))
    kernels = [s.params["image_projection"]["kernel"] for s in (first, second)]
    assert jnp.abs(kernels[0] - kernels[1]).max() > 1e-3


@pytest.mark.parametrize("error", [NoScores("3 of 4 examples"), NotFinite("no numbers")])
def test_an_evaluator_without_scores_ends_no_run(error):
    def fails(params):
        raise error

    parts = {field.name: MagicMock() for field in dataclasses.fields(Loop)}
    parts["preempted"] = lambda step: False
    parts["evaluations"] = [
        Evaluation("broken", lambda step: True, types.SimpleNamespace(outcome=fails)),
        Evaluation(
            "sound",
            lambda step: True,
            types.SimpleNamespace(outcome=lambda params: Scores({"top1": 0.5})),
        ),
    ]
    names = inspect.signature(Monitor).parameters
    told_to = {name: MagicMock() for name in names}
    parts["monitor"] = Monitor(**told_to)
    loop = Loop(**parts)
    loop.evaluate(7, MagicMock())
    told = [call.args[0] for call in told_to["progress"].print.call_args_list]
    assert told == [f"step 7  broken: no scores: {error}", "step 7  sound: top1 0.5"]
    told_to["writer"].write_scalars.assert_called_once_with(7, {"eval/sound/top1": 0.5})
    told_to["measures"].note.assert_called_once_with("no scores of broken", "at step 7")
    with pytest.raises(UserError, match="labels"):
        wrong = types.SimpleNamespace(outcome=raises_user_error)
        parts["evaluations"][0] = Evaluation("wrong", lambda step: True, wrong)
        Loop(**parts).evaluate(7, MagicMock())


def raises_user_error(params):
    raise UserError("labels")

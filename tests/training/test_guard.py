"""Steps that are skipped leave the state as it is; too many of them end the run."""

import dataclasses
import json
import math

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.errors import NotFinite, UserError
from vlp_jax.observe.accelerators import PeakFlops
from vlp_jax.observe.progress import NullProgress
from vlp_jax.observe.throughput import StepClock
from vlp_jax.observe.writers import NullWriter
from vlp_jax.parallel.batch import put_batch
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.measures import NullMeasures
from vlp_jax.training.monitor import Monitor
from vlp_jax.training.step import SeveralMetrics
from vlp_jax.training.step_rules import Guard


class Poisoned:
    """An objective whose loss and gradient are multiplied for a batch whose first pixel is 255."""

    def __init__(self, objective, factor=math.nan):
        self._objective, self._factor = objective, factor

    def __getattr__(self, name):
        return getattr(self._objective, name)

    def at(self, step):
        return self

    def loss(self, params, batch, context):
        loss, output = self._objective.loss(params, batch, context)
        poison = jnp.where(batch["image"][0, 0, 0, 0] == 255, self._factor, 1.0)
        total, count = output.metrics["loss"]
        poisoned = {**output.metrics, "loss": (total * poison, count)}
        return loss * poison, output._replace(metrics=poisoned)


def is_schedule(part):
    return isinstance(part, optax.ScaleByScheduleState)


def without_schedules(tree):
    return jax.tree.map(lambda p: None if is_schedule(p) else p, tree, is_leaf=is_schedule)


def marked(batch, value):
    batch["image"][0, 0, 0, 0] = value
    return batch


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("muon", marks=pytest.mark.slow)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_number(optimizer):
    config = helpers.tiny_config()
    config.optimizer.name, config.optimizer.ema_decay = optimizer, 0.9
    setup = helpers.setup_on(config, {"replica": 2, "fsdp": 2}, 4)
    setup = dataclasses.replace(setup, objective=Poisoned(setup.objective))
    step, state = helpers.compiled(setup), helpers.fresh(setup)
    for value in (0, 255, 255, 0):
        before = jax.device_get(state)
        batch = marked(next(helpers.batches(1)), value)
        state, metrics = step(state, put_batch(batch, setup.mesh))
        assert float(metrics["skipped"][0]) == (value == 255)
        assert math.isnan(float(metrics["loss"][0])) == (value == 255)
        after = jax.device_get(state)
        assert after.step == before.step + 1
        same = jax.tree.map(np.array_equal, after.params, before.params)
        assert all(jax.tree.leaves(same)) == (value == 255)
        for part in ("opt_state", "ema"):
            if value == 255:
                jax.tree.map(
                    np.testing.assert_array_equal,
                    without_schedules(getattr(after, part)),
                    without_schedules(getattr(before, part)),
                )
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(state.params)))
    # The learning rate goes on with the steps, as the metric says.
    schedules = jax.tree.leaves(state.opt_state, is_leaf=is_schedule)
    counts = [int(part.count) for part in schedules if is_schedule(part)]
    assert counts and set(counts) == {4}


def test_a_leap_of_the_loss_is_skipped_and_not_remembered():
    guard = Guard(spike_deviations=5.0, spike_window=20)
    rng = np.random.default_rng(0)
    losses = rng.normal(2.0, 0.1, 200).astype(np.float32)
    losses[[30, 100, 101]] = 4.0
    losses[5] = 9.0  # before the rule holds
    call, memory, skipped = jax.jit(guard.__call__), guard.init(), []
    for number, loss in enumerate(losses):
        ahead, memory = call(memory, loss, jnp.float32(1))
        skipped += [] if ahead else [number]
    assert skipped == [30, 100, 101] or skipped == [100, 101]
    assert abs(float(memory["mean"]) - 2) < 0.1 and abs(math.sqrt(memory["variance"]) - 0.1) < 0.05


def test_running_mean_and_variance_are_those_of_the_first_losses():
    guard, memory = Guard(3.0, spike_window=50), Guard(3.0).init()
    losses = np.random.default_rng(1).normal(1, 1, 40).astype(np.float32)
    for loss in losses:
        _, memory = guard(memory, jnp.asarray(loss), jnp.float32(1))
    np.testing.assert_allclose(memory["mean"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(memory["variance"], losses.var(), rtol=1e-4)


def test_a_gradient_that_is_infinite_is_enough():
    ahead, _ = Guard()({}, jnp.float32(1), jnp.float32(jnp.inf))
    assert not ahead


def test_spikes_are_skipped_in_training_and_their_memory_is_part_of_the_state():
    config = helpers.tiny_config()
    config.guard.update(spike_deviations=20.0, spike_window=4)
    setup = helpers.setup_on(config, {"replica": 2}, 2)
    setup = dataclasses.replace(setup, objective=Poisoned(setup.objective, factor=1e5))
    step, state, skipped = helpers.compiled(setup), helpers.fresh(setup), []
    for value in (0, 0, 0, 0, 0, 0, 0, 0, 255, 0):
        batch = marked(next(helpers.batches(1)), value)
        before = jax.device_get(state.guard)
        state, metrics = step(state, put_batch(batch, setup.mesh))
        skipped.append(float(metrics["skipped"][0]))
    assert skipped == [0] * 8 + [1, 0]
    assert int(before["count"]) == int(state.guard["count"]) == 4


@pytest.mark.parametrize(
    ("key", "value"), [("spike_deviations", -1.0), ("spike_window", 1), ("max_skipped", 0)]
)
def test_numbers_that_make_no_sense(key, value):
    config = helpers.tiny_config()
    config.guard[key] = value
    with pytest.raises(UserError, match=f"config.guard.{key}"):
        helpers.setup_on(config, {"replica": 2}, 2)


def make_report(tmp_path, lines, max_skipped=3):
    def keep(steps):
        (tmp_path / "examples").write_text(json.dumps(list(steps)))
        return tmp_path / "examples"

    progress = NullProgress()
    progress.print = lines.append
    return Monitor(
        log_when=lambda step: False,
        batch_size=1,
        writer=NullWriter(),
        progress=progress,
        clock=StepClock(
            forward_flops_per_example=1.0, peak=PeakFlops(1.0, "table"), device_count=1
        ),
        startup=None,
        input_metrics=lambda step: {},
        measures=NullMeasures(),
        max_skipped=max_skipped,
        keep_examples=keep,
    )


def metrics(loss, skipped):
    return {
        "loss": (jnp.float32(loss), jnp.float32(1)),
        "grad_norm": (jnp.float32(1), jnp.float32(1)),
        "skipped": (jnp.float32(skipped), jnp.float32(1)),
    }


def test_so_many_in_a_row_end_the_run_and_name_their_examples(tmp_path):
    lines = []
    report = make_report(tmp_path, lines)
    for step, bad in enumerate([1, 1, 0, 1, 1]):
        report.end_step(step, metrics(math.nan if bad else 1.0, bad))
    report.settle()
    assert report.skipped == 4 and report.skipped_in_a_row == 2
    assert lines[0] == "warning: step 0 is skipped: train/loss is nan" and len(lines) == 4
    report.end_step(5, metrics(math.inf, 1))
    with pytest.raises(NotFinite, match="train/loss is inf at step 5, the last of 3") as error:
        report.settle()
    assert error.value.status == 65
    assert json.loads((tmp_path / "examples").read_text()) == [3, 4, 5]


def test_steps_of_one_program_are_counted_one_by_one(tmp_path):
    lines = []
    report = make_report(tmp_path, lines)
    rows = [[[loss, 1], [1, 1], [skipped, 1]] for loss, skipped in ((1, 0), (math.nan, 1)) * 2]
    report.end_step(0, SeveralMetrics(("loss", "grad_norm", "skipped"), jnp.float32(rows)))
    report.settle()
    assert (report.skipped, report.skipped_in_a_row, report._clock.steps_done) == (2, 1, 4)
    assert [line.partition(" is skipped")[0] for line in lines] == [
        "warning: step 1",
        "warning: step 3",
    ]


def test_a_leap_is_told_as_one(tmp_path):
    lines = []
    report = make_report(tmp_path, lines)
    report.end_step(0, metrics(7.5, 1))
    report.settle()
    assert lines == ["warning: step 0 is skipped: train/loss leaps to 7.5"]


@pytest.mark.parametrize("before", [0.0, pytest.param(5.0, marks=pytest.mark.slow)])
def test_the_rule_about_spikes_may_come_and_go_in_a_run(tmp_path, before):
    def setup(deviations):
        config = helpers.tiny_config()
        config.guard.spike_deviations = deviations
        return helpers.setup_on(config, {"replica": 2}, 2)

    state = helpers.fresh(setup(before))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {"position": 32})
    other = setup(5.0 - before)
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.check_fits(other.abstract) == 2
        restored = checkpointer.restore(other.abstract, 2)
    wanted = {} if before else {"count": 0, "mean": 0, "variance": 0}
    assert {name: float(value) for name, value in restored.guard.items()} == wanted
    jax.tree.map(
        np.testing.assert_array_equal,
        jax.device_get((restored.params, restored.opt_state)),
        jax.device_get((state.params, state.opt_state)),
    )

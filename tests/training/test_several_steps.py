"""Several steps in one program do what they do one by one, and the host misses nothing."""

import json

import jax
import numpy as np
import pytest
from etils import epath

from tests.training.helpers import batches, compiled, fresh, setup_on, tiny_config
from vlp_jax import config as config_lib
from vlp_jax.errors import NotFinite, UserError
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel.batch import put_batch
from vlp_jax.planning import hlo, loops, traffic
from vlp_jax.planning.compile import compile_setup
from vlp_jax.train import make_watchdog, train
from vlp_jax.training.several_steps import compile_steps
from vlp_jax.training.when import EverySteps, StepsAhead

MESHES = {"one device": ({}, 1), "fsdp": ({"fsdp": 2, "replica": 2}, 4)}


def on_devices(setup, count):
    return [put_batch(batch, setup.mesh) for batch in batches(count)]


@pytest.mark.parametrize("mesh", MESHES)
def test_it_computes_what_single_steps_do(mesh):
    setup = setup_on(tiny_config(), *MESHES[mesh])
    data = on_devices(setup, 5)
    state, step, rows = fresh(setup), compiled(setup), []
    for batch in data:
        state, metrics = step(state, batch)
        rows.append(metrics.fetch())
    steps = compile_steps(setup.step, setup.abstract, setup.batch_spec, setup.mesh, 3)
    other, first = steps(fresh(setup), *data[:3])
    other, second = steps(other, *data[3:])  # fewer than it was compiled for
    together = first.fetch() + second.fetch()
    assert int(other.step) == int(state.step) == 5 and len(together) == 5
    for one, row in zip(together, rows, strict=True):
        assert one.keys() == row.keys()
        for name in row:
            np.testing.assert_allclose(one[name], row[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), other, state)
    assert jax.tree.map(lambda x: x.sharding, other) == jax.tree.map(lambda x: x.sharding, state)


def test_a_step_of_several_sends_what_a_single_one_does():
    """Within the loop the state stays as it is sharded."""
    sent = []
    for most in (1, 3):
        config = tiny_config()
        config.steps_per_dispatch = most
        setup = setup_on(config, *MESHES["fsdp"])
        module = hlo.parse(compile_setup(setup).text)
        shape = dict(setup.mesh.shape)
        found = traffic.collectives(module, loops.count_runs(module), shape)
        sent.append(traffic.by_kind_and_axis(found))
    assert sent[0] == sent[1] and sent[0]


def test_it_takes_over_the_state_and_moves_nothing_by_itself():
    setup = setup_on(tiny_config(), {}, 1)
    data = on_devices(setup, 4)
    steps = compile_steps(setup.step, setup.abstract, setup.batch_spec, setup.mesh, 2)
    before = fresh(setup)
    state, _ = steps(before, *data[:2])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    with jax.transfer_guard("disallow"):
        state, metrics = steps(state, *data[2:])
        jax.block_until_ready(metrics)
    assert int(state.step) == 4


@pytest.mark.parametrize("count", [0, 3])
def test_another_number_of_batches_is_refused(count):
    setup = setup_on(tiny_config(), {}, 1)
    steps = compile_steps(setup.step, setup.abstract, setup.batch_spec, setup.mesh, 2)
    with pytest.raises(ValueError, match=f"{count} batches for a program of 1 to 2 steps"):
        steps(fresh(setup), *on_devices(setup, count))


def test_the_host_looks_before_every_step_at_which_it_has_something_to_do():
    ahead = StepsAhead(
        most=8,
        first=3,
        last=40,
        begins=(EverySteps(10, last=40), lambda step: step == 17),
    )
    step, begun = 3, []
    while step < 40:
        begun.append(step)
        step += ahead(step)
    # 3 alone, since its time is told; then never over a multiple of 10, over 17 or over the end.
    assert begun == [3, 4, 10, 17, 20, 28, 30, 38]
    assert step == 40


def test_one_step_a_dispatch_is_one():
    ahead = StepsAhead(most=1, first=0, last=9, begins=())
    assert [ahead(step) for step in range(9)] == [1] * 9


def run(config, workdir, **settings):
    config = config.copy_and_resolve_references().unlock()
    config_lib.override(config, [f"{key}={value}" for key, value in settings.items()])
    state = train(config, workdir, StartupClock())
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return state, {record["step"]: record for record in records}


@pytest.fixture
def demo(shapes_dir):
    config = config_lib.smoke(config_lib.load("configs/demo.py"))
    config_lib.override(
        config,
        [
            "duration.steps=13",
            "log.every.steps=5",
            "checkpoint.every.percent=None",
            "checkpoint.every.steps=6",
            "checkpoint.keep_last=5",
            *(f"evaluators.{name}=None" for name in config.evaluators if name != "zero_shot"),
            "evaluators.zero_shot.every.percent=None",
            "evaluators.zero_shot.every.steps=9",
            "watchdog.step_minutes=1.0",
        ],
    )
    return config


def test_a_run_logs_saves_and_evaluates_at_the_same_steps(demo, tmp_path, monkeypatch):
    handed = []
    original = StepsAhead.__call__

    def noted(self, step):
        count = original(self, step)
        handed.append((step, count))
        return count

    monkeypatch.setattr(StepsAhead, "__call__", noted)
    one, logged = run(demo, tmp_path / "one")
    assert {count for _, count in handed} == {1}
    handed.clear()
    four, others = run(demo, tmp_path / "four", steps_per_dispatch=4)
    assert handed == [(0, 1), (1, 4), (5, 1), (6, 3), (9, 1), (10, 2), (12, 1)]
    assert logged.keys() == others.keys()
    for step, record in logged.items():
        assert others[step].keys() == record.keys()
        compared = [k for k in record if k.startswith(("train/", "eval/"))]
        assert compared
        for name in compared:
            if not name.endswith("seconds"):
                np.testing.assert_allclose(
                    others[step][name], record[name], rtol=1e-3, atol=1e-4, err_msg=name
                )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), four.params, one.params
    )

    def saved(name):
        return sorted(
            int(p.name) for p in (tmp_path / name / "checkpoints").iterdir() if p.is_dir()
        )

    assert saved("one") == saved("four") == [6, 12, 13]
    # Resumed in the middle, with another number of steps at once: the same end.
    for step in (12, 13):
        (tmp_path / "four" / "checkpoints" / str(step)).rename(tmp_path / str(step))
    again, _ = run(demo, tmp_path / "four", steps_per_dispatch=3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4),
        again.params,
        one.params,
    )


def test_skipped_steps_within_a_program_are_counted_one_by_one(demo, tmp_path):
    """From some step on the parameters are infinite, and all later ones are skipped."""
    told = set()
    for most in (1, 4):
        with pytest.raises(NotFinite, match="the last of 5 that were skipped in a row") as raised:
            run(
                demo,
                tmp_path / str(most),
                steps_per_dispatch=most,
                **{"optimizer.name": "adamw", "optimizer.learning_rate": 1e38},
            )
        told.add(str(raised.value).split(";")[0])
        (named,) = (tmp_path / str(most)).glob("skipped-steps-*")
        assert len(named.read_text().splitlines()) == 5
    assert len(told) == 1, told


def test_the_watchdog_waits_for_all_of_them(tmp_path):
    config = config_lib.base()
    config.watchdog.step_minutes = 2.0
    one = make_watchdog(config, epath.Path(tmp_path))
    config.steps_per_dispatch = 4
    four = make_watchdog(config, epath.Path(tmp_path))
    assert (one._step_seconds, four._step_seconds) == (120, 480)


def test_it_is_at_least_one(demo, tmp_path):
    with pytest.raises(UserError, match="steps_per_dispatch is at least 1, not 0"):
        run(demo, tmp_path, steps_per_dispatch=0)

"""Several steps in one program do what they do one by one, and the host misses nothing."""

import json
import types

import helpers
import jax
import numpy as np
import pytest
from etils import epath

from vlp_jax import config as config_lib
from vlp_jax import smoke as smoke_lib
from vlp_jax.errors import NotFinite, UserError
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.parallel.batch import put_batch
from vlp_jax.planning import hlo, loops, traffic
from vlp_jax.train import train
from vlp_jax.training.build import RunComponents
from vlp_jax.training.monitor import make_watchdog
from vlp_jax.training.step import compile_steps
from vlp_jax.training.when import EverySteps, StepsAhead

MESHES = {"one device": ({}, 1), "fsdp": ({"fsdp": 2, "replica": 2}, 4)}


def on_devices(setup, count):
    return [put_batch(batch, setup.mesh) for batch in helpers.batches(count)]


def programs_of(setup):
    """Of one step and of three."""
    arguments = setup.step, setup.abstract, setup.batch_spec, setup.mesh, 3
    return helpers.once(setup, "_three_steps", lambda: compile_steps(*arguments))


@pytest.mark.parametrize("mesh", [pytest.param("one device", marks=pytest.mark.slow), "fsdp"])
def test_it_computes_what_single_steps_do(mesh):
    setup = helpers.setup_on(helpers.tiny_config(), *MESHES[mesh])
    data = on_devices(setup, 5)
    state, step, rows = helpers.fresh(setup), helpers.compiled(setup), []
    for batch in data:
        state, metrics = step(state, batch)
        rows.append(metrics.fetch())
    steps = programs_of(setup)
    other, first = steps(helpers.fresh(setup), *data[:3])
    second = []
    for batch in data[3:]:  # fewer than it was compiled for
        other, metrics = steps(other, batch)
        second.append(metrics)
    together = [*first.fetch(), *(metrics.fetch() for metrics in second)]
    assert int(other.step) == int(state.step) == 5 and len(together) == 5
    for one, row in zip(together, rows, strict=True):
        assert one.keys() == row.keys()
        for name in row:
            np.testing.assert_allclose(one[name], row[name], rtol=2e-5, atol=1e-6, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), other, state)
    assert jax.tree.map(lambda x: x.sharding, other) == jax.tree.map(lambda x: x.sharding, state)


def test_within_the_loop_a_step_sends_what_a_single_one_does():
    """The state stays as it is sharded, and the compiler knows the number of rounds."""
    setup = helpers.setup_on(helpers.tiny_config(), *MESHES["fsdp"])
    steps = programs_of(setup)
    sent = []
    for program in (steps.single.program, steps.program):
        module = hlo.parse(program.as_text())
        runs = loops.count_runs(module)
        assert not runs.unknown
        found = traffic.collectives(module, runs, dict(setup.mesh.shape))
        sent.append(traffic.by_kind_and_axis(found))
    single, several = sent
    assert single and several.keys() == single.keys()
    for key, figures in single.items():
        assert several[key] == {name: 3 * value for name, value in figures.items()}


def test_it_takes_over_the_state_moves_nothing_by_itself_and_knows_its_batches():
    setup = helpers.setup_on(helpers.tiny_config(), *MESHES["fsdp"])
    data = on_devices(setup, 6)
    steps = programs_of(setup)
    before = helpers.fresh(setup)
    state, _ = steps(before, *data[:3])
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(before.params))
    with jax.transfer_guard("disallow"):
        state, metrics = steps(state, *data[3:])
        jax.block_until_ready(metrics)
    assert int(state.step) == 6
    for count in (0, 2, 4):
        with pytest.raises(ValueError, match=f"{count} batches for programs of 1 and of 3 steps"):
            steps(state, *data[:count])


def test_the_host_looks_before_every_step_at_which_it_has_something_to_do():
    ahead = StepsAhead(
        several=4,
        first=3,
        last=30,
        begins=(EverySteps(10, last=30), lambda step: step == 17),
    )
    step, begun = 3, []
    while step < 30:
        begun.append(step)
        step += ahead(step)
    # 3 alone, since its time is told; then never over a multiple of 10, over 17 or over the end.
    assert begun == [3, 4, 8, 9, 10, 14, 15, 16, 17, 18, 19, 20, 24, 28, 29]
    assert step == 30


def test_traces_collections_of_garbage_and_new_losses_come_between_programs():
    config = helpers.tiny_config()
    config_lib.override(config, ["profile.first=7", "profile.last=9", "steps_per_dispatch=4"])
    config_lib.override(config, ["garbage_collection_every=16"])
    never = EverySteps(0, last=40)
    parts = types.SimpleNamespace(
        setup=types.SimpleNamespace(
            config=config, units=types.SimpleNamespace(total_steps=40), phases=(0, 22)
        ),
        save_when=types.SimpleNamespace(steps=never),
        log_when=never,
        evaluations=(),
    )
    ahead = RunComponents.steps_ahead(parts, 0)
    step, begun = 0, []
    while step < 40:
        begun.append(step)
        step += ahead(step)
    assert begun == [0, 1, 5, 6, 7, 8, 9, 10, 14, 15, 16, 20, 21, 22, 26, 30, 31, 32, 36]


def test_one_step_a_dispatch_is_one():
    ahead = StepsAhead(several=1, first=0, last=9, begins=())
    assert [ahead(step) for step in range(9)] == [1] * 9


def run(config, workdir, **settings):
    config = config.copy_and_resolve_references().unlock()
    config_lib.override(config, [f"{key}={value}" for key, value in settings.items()])
    state = train(config, workdir, StartupClock())
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return state, {record["step"]: record for record in records}


@pytest.fixture
def demo(shapes_dir):
    config = smoke_lib.smoke(config_lib.load("configs/demo.py"))
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


@pytest.mark.slow  # test_processes.py has its parts
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
    two, others = run(demo, tmp_path / "two", steps_per_dispatch=2)
    # Scores at 9, checkpoints at 6 and 12, logs at 5 and 10; 0 and 12 are alone.
    assert [step for step, count in handed if count == 2] == [1, 3, 6, 10]
    assert sum(count for _, count in handed) == 13
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
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4), two.params, one.params
    )

    def saved(name):
        return sorted(
            int(p.name) for p in (tmp_path / name / "checkpoints").iterdir() if p.is_dir()
        )

    assert saved("one") == saved("two") == [6, 12, 13]
    # Resumed in the middle, with other steps at once than before: the same end.
    for step in (12, 13):
        (tmp_path / "two" / "checkpoints" / str(step)).rename(tmp_path / str(step))
    handed.clear()
    again, _ = run(demo, tmp_path / "two", steps_per_dispatch=2)
    assert handed == [(6, 1), (7, 2), (9, 1), (10, 2), (12, 1)]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-2, atol=1e-4),
        again.params,
        one.params,
    )

    with pytest.raises(
        UserError, match="newest checkpoint is of step 13, and config.duration is 9"
    ):
        run(demo, tmp_path / "two", **{"duration.steps": 9})


@pytest.mark.slow  # test_guard.py has its parts
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
    with pytest.raises(UserError, match="steps_per_dispatch must be at least 1, not 0"):
        run(demo, tmp_path, steps_per_dispatch=0)

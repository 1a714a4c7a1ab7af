"""An objective that keeps something of its own, neither trained nor constant, from step to step."""

import dataclasses
from typing import Any

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from vlp_jax import objectives
from vlp_jax.errors import UserError
from vlp_jax.evaluators.loss import evaluator_functions
from vlp_jax.models.dense import Named
from vlp_jax.objectives.base import LossOutput, Objective
from vlp_jax.parallel.batch import put_batch
from vlp_jax.planning.memory import state_bytes
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.state import context_of, key_for

DECAY = 0.8
ONE, EIGHT, FSDP = ({"replica": 1}, 1), ({"replica": 8}, 8), ({"fsdp": 4, "tensor": 2}, 8)


@dataclasses.dataclass(frozen=True)
class Centred(Objective):
    """Another objective, and the distance of the image embeddings from a centre that follows them
    and from those of the averaged parameters, if there are any."""

    inner: Objective

    @property
    def model(self) -> Any:
        return self.inner.model

    @property
    def reads(self) -> Any:
        return self.inner.reads

    def init(self, rng, batch_spec):
        return self.inner.init(rng, batch_spec)

    def functions(self):
        return self.inner.functions()

    def init_state(self, batch_spec):
        return {
            "centre": Named(jnp.full(self.model.embed_dim, 0.5), ("embed",)),
            "examples": jnp.int32(0),
        }

    def forward(self, params, batch, context):
        embed = self.functions()["embed_image"]
        taught = params if context.ema_params is None else context.ema_params
        return {
            "inner": self.inner.forward(params, batch, context),
            "image": embed(params, batch["image"]),
            "taught": jax.lax.stop_gradient(embed(taught, batch["image"])),
        }

    def reduce(self, params, examples, context):
        value, output = self.inner.reduce(params, examples["inner"], context)
        image, state = examples["image"], context.state
        value += jnp.square(image - state["centre"]).sum(axis=1).mean()
        if context.ema_params is not None:
            value += jnp.square(image - examples["taught"]).sum(axis=1).mean()
        mean = jax.lax.stop_gradient(image).mean(axis=0)
        after = {
            "centre": DECAY * state["centre"] + (1 - DECAY) * mean,
            "examples": state["examples"] + len(image),
        }
        metrics = {**output.metrics, "step": (jnp.float32(context.step), jnp.float32(1))}
        return value, LossOutput(metrics, after)


def make_centred(*, tokenizer, inner):
    return Centred(objectives.make_objective(inner, tokenizer))


@pytest.fixture(autouse=True)
def table(monkeypatch):
    monkeypatch.setitem(objectives.OBJECTIVES, "centred", make_centred)


def config_of(**optimizer):
    config = helpers.tiny_config()
    config.objective = ConfigDict({"name": "centred", "inner": config.objective})
    config.optimizer.update(optimizer)
    return config


def run(setup, state, batches, step=None):
    step = step or helpers.compiled(setup)
    for batch in batches:
        state, metrics = step(state, put_batch(batch, setup.mesh))
    return state, metrics


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))


def test_the_state_follows_the_steps_and_the_loss_knows_it():
    setup = helpers.setup_on(config_of(), *ONE)
    state = helpers.fresh(setup)
    centre = np.full(16, 0.5, np.float32)
    assert_same(state.objective, {"centre": centre, "examples": np.int32(0)})
    step, embed = helpers.compiled(setup), jax.jit(setup.objective.functions()["embed_image"])
    loss = jax.jit(
        lambda state, batch: setup.objective.loss(
            state.params, batch, context_of(state, key_for(setup.config.seed, state.step, 1))
        )[0]
    )
    seen = []
    for number, batch in enumerate(helpers.batches(3)):
        image = np.asarray(embed(state.params, batch["image"]), np.float64)
        expected, before = float(loss(state, batch)), jax.device_get(state.params)
        state, metrics = step(state, put_batch(batch, setup.mesh))
        assert metrics["step"][0] == number
        total, count = metrics["loss"]
        seen.append(expected - float(total / count))  # the metric is the inner loss alone
        np.testing.assert_allclose(
            seen[-1], np.square(image - centre).sum(axis=1).mean(), rtol=1e-4
        )
        centre = DECAY * centre + (1 - DECAY) * image.mean(axis=0)
        np.testing.assert_allclose(state.objective["centre"], centre, rtol=1e-5, atol=1e-6)
        changed = jax.tree.map(lambda a, b: np.abs(a - b).max(), before, dict(state.params))
        assert max(jax.tree.leaves(changed)) > 0
    assert state.objective["examples"] == 3 * helpers.BATCH and seen[0] != seen[2]


def test_the_average_of_the_parameters_is_a_teacher():
    setup = helpers.setup_on(config_of(ema_decay=0.5), *ONE)
    state = helpers.fresh(setup)
    state = state.replace(ema=jax.tree.map(lambda x: 0.5 * x, state.params))
    (batch,) = helpers.batches(1)
    loss = jax.jit(
        lambda state, batch: setup.objective.loss(
            state.params, batch, context_of(state, jax.random.key(0))
        )[0]
    )
    taught = float(loss(state, batch)) - float(loss(state.replace(ema={}), batch))
    embed = jax.jit(setup.objective.functions()["embed_image"])
    image, teacher = (embed(params, batch["image"]) for params in (state.params, state.ema))
    expected = np.square(np.asarray(image - teacher)).sum(axis=1).mean()
    assert expected > 1e-4
    np.testing.assert_allclose(taught, expected, rtol=1e-3)


def test_a_skipped_step_leaves_it_as_it_was():
    setup = helpers.setup_on(config_of(ema_decay=0.9), *EIGHT)
    state, step = helpers.fresh(setup), helpers.compiled(setup)
    state, _ = run(setup, state, helpers.batches(1), step)
    before = jax.device_get(state)
    broken = {**before.objective, "centre": np.full(16, np.nan, np.float32)}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, setup.abstract.objective)
    state = state.replace(objective=jax.device_put(broken, shardings))
    state, metrics = run(setup, state, helpers.batches(1, seed=1), step)
    assert metrics["skipped"][0] == 1
    after = jax.device_get(state)
    assert_same(after.objective, broken)
    assert_same(after.params, before.params)


@pytest.mark.parametrize(
    "there", [pytest.param(ONE, marks=pytest.mark.slow), FSDP], ids=["one device", "sharded"]
)
def test_a_run_goes_on_with_it_elsewhere_and_here(there, tmp_path):
    setup = helpers.setup_on(config_of(ema_decay=0.9), *EIGHT)
    first, second = helpers.batches(2)
    step = helpers.compiled(setup)
    state, _ = run(setup, helpers.fresh(setup), [first], step)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, input_state={"position": helpers.BATCH})
    saved = jax.device_get(state)
    expected, _ = run(setup, state, [second], step)
    with Checkpointer(tmp_path) as checkpointer:
        restored = checkpointer.restore(setup.abstract, 1)
        assert_same(run(setup, restored, [second], step)[0], expected)
        other = helpers.setup_on(config_of(ema_decay=0.9), *there)
        moved = checkpointer.restore(other.abstract, 1)
        assert_same(moved, saved)
        went_on, _ = run(other, moved, [second])
        np.testing.assert_allclose(
            went_on.objective["centre"], expected.objective["centre"], rtol=1e-4, atol=1e-6
        )
        config = helpers.tiny_config()
        config.optimizer.ema_decay = 0.9
        plain = helpers.setup_on(config, *EIGHT)
        with pytest.raises(UserError, match="objective/centre is .* and absent in the model"):
            checkpointer.check_fits(plain.abstract)


def test_it_is_spread_over_the_devices_by_its_names():
    setup = helpers.setup_on(config_of(ema_decay=0.9), *FSDP)
    centre = setup.abstract.objective["centre"]
    assert centre.sharding.shard_shape(centre.shape) == (4,)
    state = helpers.fresh(setup)
    assert state.objective["centre"].sharding == centre.sharding
    assert state.objective["examples"].sharding.is_fully_replicated
    assert state_bytes(setup.abstract, setup.mesh).total == sum(
        x.nbytes for x in jax.tree.leaves(state)
    )


def test_parts_of_a_composite_have_their_own():
    config = helpers.tiny_config()
    inner = {"name": "centred", "inner": config.objective}
    config.objective = ConfigDict(
        {"name": "composite", "parts": {"a": inner, "b": config.objective, "c": inner}}
    )
    setup = helpers.setup_on(config, *ONE)
    state = helpers.fresh(setup)
    key = jax.random.key(0)
    after = jax.jit(
        lambda state, batch: setup.objective.loss(state.params, batch, context_of(state, key))[1]
    )
    for batch in helpers.batches(2):
        state = state.replace(objective=after(state, batch).state)
    assert set(state.objective) == {"a", "c"}
    assert_same(state.objective["a"], state.objective["c"])
    assert state.objective["a"]["examples"] == 2 * helpers.BATCH
    nested = {"name": "composite", "parts": {"x": config.objective, "y": inner}}
    objective = objectives.make_objective(ConfigDict(nested), helpers.TOKENIZER)
    assert list(objective.parts()) == ["x/a", "x/b", "x/c", "y"]
    assert set(objective.init_state(setup.batch_spec)) == {"x.a", "x.c", "y"}


def test_the_loss_of_a_split_takes_a_fresh_state():
    setup = helpers.setup_on(config_of(), *ONE)
    (batch,) = helpers.batches(1)
    function = evaluator_functions(setup.objective)["loss_of_batch"]
    fields = {**batch, "number": np.arange(helpers.BATCH)}
    metrics = jax.jit(function)(helpers.fresh(setup).params, fields)
    assert set(metrics) == {"loss", "batch_accuracy", "logit_scale", "logit_bias", "step"}

"""Frozen sub-trees and layer-wise learning-rate decay."""

import re

import closed_forms
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vlp_jax.errors import UserError
from vlp_jax.parallel.batch import put_batch
from vlp_jax.train import describe_run
from vlp_jax.training import param_groups
from vlp_jax.training.checkpoint import Checkpointer
from vlp_jax.training.optimizer import decay_mask

FROZEN_IMAGE = ("image/.*", "image_projection/kernel")


def config_with(optimizer, **objective):
    config = helpers.tiny_config(**objective)
    for key, value in optimizer.items():
        config.optimizer[key] = value
    return config


def decayed(image=0.5, text=1.0, name="adamw"):
    return {"name": name, "layer_decay": {"image": image, "text": text}}


def one_device(config):
    return helpers.setup_on(config, {"replica": 1}, 1)


def random_like(tree, seed):
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32)  # noqa: E731
    return jax.tree.map(draw, tree)


def separate(params):
    """The same parameters with layers that stand alone."""
    flat = {}
    for path, leaf in param_groups.flatten(params).items():
        if "/layers/" in path:
            for i in range(leaf.shape[0]):
                flat[path.replace("/layers/", f"/layer_{i}/")] = leaf[i]
        else:
            flat[path] = leaf
    return param_groups.unflatten(flat)


def cut(updates):
    """path -> update, with each of stacked layers by itself."""
    return param_groups.flatten(separate(param_groups.unflatten(updates)))


def updates_of(optimizer, params, gradients):
    """The updates of each of several steps, by path."""
    state, update, found = optimizer.init(params), jax.jit(optimizer.update), []
    for grads in gradients:
        updates, state = update(grads, state, params)
        found.append(param_groups.flatten(updates))
        params = optax.apply_updates(params, updates)
    return found


# Layer-wise decay.


def test_factors_by_hand():
    params = one_device(helpers.tiny_config()).abstract.params
    factors = param_groups.layer_factors(params, {"image": 0.5, "text": 1.0})
    assert all(path.startswith("image/") for path in factors)
    assert factors["image/position_embedding"] == 0.125  # layer 0 of L + 1 = 3
    assert factors["image/patch_embedding/projection/kernel"] == 0.125
    np.testing.assert_array_equal(
        factors["image/encoder/layers/mlp/up/kernel"], np.array([0.25, 0.5]).reshape(2, 1, 1)
    )
    assert factors["image/encoder/layers/norm_mlp/scale"].shape == (2, 1)
    assert factors["image/encoder/norm/scale"] == 1 and factors["image/pooling/probe"] == 1


LAYERS = {  # of two blocks each: L + 1 is 3
    "patch_embedding": 0, "position_embedding": 0, "token_embedding": 0,
    "encoder/layer_0": 1, "encoder/layer_1": 2, "encoder/norm": 3, "pooling": 3,
}  # fmt: skip


def place(path):
    """Tower and layer of a parameter, with each layer by itself: ("image", 1), or (None, 3)."""
    tower, _, rest = path.partition("/")
    if tower not in ("image", "text"):
        return None, 3
    (layer,) = (layer for name, layer in LAYERS.items() if rest.startswith(name))
    return tower, layer


def test_updates_equal_those_of_an_optimizer_per_layer():
    config = config_with(decayed(0.7, 0.4))
    config.optimizer.clip_norm = 0.0
    setup = one_device(config)
    params = random_like(setup.abstract.params, 0)
    gradients = [random_like(params, seed) for seed in (1, 2, 3)]
    alone, decays = separate(params), {"image": 0.7, "text": 0.4, None: 1.0}

    def adamw(factor):
        numbers = config.optimizer
        return optax.adamw(
            lambda step: setup.schedule(step) * factor,
            b1=numbers.b1, b2=numbers.b2, eps=numbers.eps, weight_decay=numbers.weight_decay,
            mask=lambda p: decay_mask(p, numbers.no_decay),
        )  # fmt: skip

    oracle = optax.partition(
        {
            f"{tower} {layer}": adamw(decay ** (3 - layer))
            for tower, decay in decays.items()
            for layer in range(4)
        },
        param_groups.map_with_path(lambda path, _: "{} {}".format(*place(path)), alone),
    )
    ours = [cut(updates) for updates in updates_of(setup.optimizer, params, gradients)]
    expected = updates_of(oracle, alone, [separate(g) for g in gradients])
    for step in range(3):
        for path, update in expected[step].items():
            np.testing.assert_allclose(ours[step][path], update, rtol=1e-5, atol=1e-9, err_msg=path)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_stacked_layers_are_updated_as_separate_ones(name):
    setup = one_device(config_with({"name": name}))
    params = random_like(setup.abstract.params, 0)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    stacked = updates_of(setup.optimizer, params, gradients)
    alone = updates_of(setup.optimizer, separate(params), [separate(g) for g in gradients])
    for step in range(2):
        ours = cut(stacked[step])
        assert set(ours) == set(alone[step])
        for path, update in ours.items():
            np.testing.assert_allclose(
                update, alone[step][path], rtol=1e-4, atol=1e-7, err_msg=path
            )


def test_decay_leaves_the_optimizers_state_as_it_is():
    plain = one_device(helpers.tiny_config()).abstract
    other = one_device(config_with(decayed(0.7, 0.4))).abstract
    assert jax.tree.structure(plain) == jax.tree.structure(other)


@pytest.mark.parametrize(
    ("tower", "decay", "message"),
    [("image", 0.0, r"layer_decay.image must be in \(0, 1\]"), ("text", 1.1, "not 1.1")],
)
def test_decays_out_of_range(tower, decay, message):
    config = helpers.tiny_config()
    config.optimizer.layer_decay[tower] = decay
    with pytest.raises(UserError, match=message):
        one_device(config)


def test_decay_of_a_tower_or_a_place_that_is_not_known():
    params = {"image": {"encoder": {"norm": {"scale": np.zeros(3)}}, "gate": np.zeros(3)}}
    with pytest.raises(UserError, match=r"layer_decay.text is 0.5 .* \(it has: image\)"):
        param_groups.layer_factors(params, {"text": 0.5})
    with pytest.raises(UserError, match="the layer of image/gate is not known"):
        param_groups.layer_factors(params, {"image": 0.5})


# Frozen parameters.


@pytest.mark.parametrize(
    "name, mesh",
    [
        ("muon", {"replica": 2, "fsdp": 2, "tensor": 2}),
        pytest.param("adamw", {"replica": 1}, marks=pytest.mark.slow),
        pytest.param("adamw", {"replica": 2, "fsdp": 2, "tensor": 2}, marks=pytest.mark.slow),
        pytest.param("muon", {"replica": 1}, marks=pytest.mark.slow),
    ],
)
def test_frozen_parameters_stay_and_have_no_state(name, mesh):
    config = config_with({"name": name, "frozen": FROZEN_IMAGE, "ema_decay": 0.9})
    setup = helpers.setup_on(config, mesh, 8 if len(mesh) > 1 else 1)
    before = param_groups.flatten(jax.device_get(helpers.fresh(setup).params))
    state, _ = helpers.train(setup, 3)
    state = jax.device_get(state)
    after, ema = param_groups.flatten(state.params), param_groups.flatten(state.ema)
    for path, value in before.items():
        frozen = path.startswith("image")
        assert np.array_equal(after[path], value) == frozen, path
        assert np.array_equal(ema[path], value) == frozen, path
    held = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
    ]
    assert not any("/image" in path for path in held)
    assert any("/text/encoder/layers/mlp/up/kernel" in path for path in held)


def test_the_gradient_of_frozen_parameters_does_not_count():
    config = config_with({"frozen": FROZEN_IMAGE, "clip_norm": 1e-3})
    setup = one_device(config)
    state = helpers.fresh(setup)
    params, batch = jax.device_get(state.params), next(helpers.batches(1))
    after, metrics = helpers.compiled(setup)(state, put_batch(batch, setup.mesh))
    grads = helpers.gradients(setup, params, batch)
    trained, frozen = param_groups.split(grads, FROZEN_IMAGE)
    norm = optax.tree.norm(trained)
    assert optax.tree.norm(frozen) > 0.1 * norm
    np.testing.assert_allclose(metrics["grad_norm"][0], norm, rtol=1e-4)
    (moments,) = (s for s in jax.tree.leaves(after.opt_state, is_leaf=_adam) if _adam(s))
    expected = jax.tree.map(lambda g: 0.1 * 1e-3 * g / norm, trained)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-9), moments.mu, expected
    )


def _adam(state):
    return isinstance(state, optax.ScaleByAdamState)


def test_the_backward_pass_of_a_frozen_tower_is_not_computed():
    def flops(frozen):
        setup = one_device(config_with({"frozen": frozen}, scan_layers=False))
        return helpers.compiled(setup).program.cost_analysis()["flops"], setup

    all_trained, setup = flops(())
    frozen_image, _ = flops(FROZEN_IMAGE)
    image = helpers.BATCH * closed_forms.vit(setup.objective.model.image)
    # Backward is twice the forward pass, and nothing of it is left.
    assert all_trained - frozen_image > 1.8 * image


def test_a_run_with_frozen_parameters_resumes(tmp_path):
    setup = one_device(config_with({"frozen": FROZEN_IMAGE, "clip_norm": 1e-3}))
    state, step = helpers.fresh(setup), helpers.compiled(setup)
    first, second = helpers.batches(2)
    state, _ = step(state, put_batch(first, setup.mesh))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, input_state={"position": 16})
    with Checkpointer(tmp_path) as checkpointer:
        assert checkpointer.check_fits(setup.abstract) == 1
        restored = checkpointer.restore(setup.abstract, 1)
        thawed = one_device(helpers.tiny_config())
        with pytest.raises(UserError, match="was written with another config.optimizer"):
            checkpointer.check_fits(thawed.abstract)
    ours, expected = (step(s, put_batch(second, setup.mesh)) for s in (restored, state))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(ours), jax.device_get(expected))


def test_freezing_and_decay_together():
    frozen = r"image/(patch_embedding|encoder/layers/attention)/.*"
    setup = one_device(config_with({**decayed(0.5), "frozen": (frozen,)}))
    params = random_like(setup.abstract.params, 0)
    grads = random_like(params, 1)
    update, state = jax.jit(setup.optimizer.update), setup.optimizer.init(params)
    updates = param_groups.flatten(update(grads, state, params)[0])
    assert not any(re.fullmatch(frozen, path) for path in updates)
    bias, last = (updates[f"image/encoder/{p}/bias"] for p in ("layers/mlp/up", "norm"))
    # Adam's first step has the size of the learning rate, whatever else of a layer is frozen.
    ratios = np.abs(bias).mean(1) / np.abs(last).mean()
    np.testing.assert_allclose(ratios, [0.25, 0.5], rtol=1e-3)


@pytest.mark.parametrize(
    ("frozen", "message"),
    [
        (("imge/.*",), "'imge/.*' is the whole path of no parameter.*image, image_projection"),
        (("image",), "'image' is the whole path of no parameter"),
        ((".*",), r"freezes all parameters \(image, .*text_projection\)"),
        (("image/(",), "is no regular expression"),
        ((3,), "3 is no regular expression"),
    ],
)
def test_bad_patterns(frozen, message):
    with pytest.raises(UserError, match=message) as error:
        one_device(config_with({"frozen": frozen}))
    assert "\n" not in str(error.value)


def test_the_run_tells_how_much_is_frozen():
    setup = one_device(config_with({"frozen": ("text/.*",)}))
    sizes = {p: x.size for p, x in param_groups.flatten(setup.abstract.params).items()}
    frozen = sum(size for path, size in sizes.items() if path.startswith("text/"))
    line = f"{sum(sizes.values()):,} parameters, of which {frozen:,} frozen; steps 0 to 20"
    assert describe_run(setup, 0).startswith(line)

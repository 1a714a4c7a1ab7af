"""Adafactor and Lion against NumPy, and what they hold."""

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_param_groups import one_device, random_like, separate, updates_of

from vlp_jax.errors import UserError
from vlp_jax.training import param_groups
from vlp_jax.training.optimizer import make_optimizer
from vlp_jax.training.when import Units

UP, BIAS = "image/encoder/layers/mlp/up/kernel", "image/encoder/layers/mlp/up/bias"
PROJECTION = "image_projection/kernel"
ROUNDING = 1e-6  # of updates near 3e-4: a momentum in bfloat16 that is rounded the other way


def config_of(name, **changes):
    config = helpers.tiny_config()
    config.optimizer.name = name
    config.optimizer.clip_norm = 0.0
    for key, value in changes.items():
        config.optimizer[key] = value
    return config


def bfloat16(x):
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


def adafactor_by_hand(param, gradients, numbers, rates, decays, factored):
    """The updates of one parameter that is no stack, in float64."""
    rows, columns, v, momentum = 0.0, 0.0, 0.0, 0.0
    for t, (grad, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        b2 = min(numbers.b2, 1 - t**-0.8)
        square = grad**2 + 1e-30
        if factored:
            rows = b2 * rows + (1 - b2) * square.mean(axis=1)
            columns = b2 * columns + (1 - b2) * square.mean(axis=0)
            scaled = grad / np.sqrt(np.outer(rows, columns) / rows.mean())
        else:
            v = b2 * v + (1 - b2) * square
            scaled = grad / np.sqrt(v)
        # Optax multiplies in the dtype of what is held, so b1 is rounded too, to 0.8984.
        kept = bfloat16(numbers.b1) * momentum
        average = kept + (1 - numbers.b1) * scaled
        momentum = bfloat16(average)
        update = -rate * (average + decays * numbers.weight_decay * param)
        param = param + update
        yield update


def lion_by_hand(param, gradients, numbers, rates, decays, factored):
    momentum = 0.0
    for grad, rate in zip(gradients, rates, strict=True):
        direction = np.sign(numbers.b1 * momentum + (1 - numbers.b1) * grad)
        momentum = numbers.b2 * momentum + (1 - numbers.b2) * grad
        update = -rate * (direction + decays * numbers.weight_decay * param)
        param = param + update
        yield update


@pytest.mark.parametrize(
    ("name", "by_hand"), [("adafactor", adafactor_by_hand), ("lion", lion_by_hand)]
)
def test_updates_equal_those_by_hand(name, by_hand):
    setup = one_device(config_of(name, b2=0.45))  # low, so that the bound is met at step 3
    params = random_like(setup.abstract.params, 0)
    gradients = [random_like(params, seed) for seed in (1, 2, 3, 4)]
    ours = updates_of(setup.optimizer, params, gradients)
    rates = [float(setup.schedule(step)) for step in range(4)]
    flat = [param_groups.flatten(tree) for tree in (params, *gradients)]
    # [2 layers, 32, 64] is factored layer by layer; a bias is not, nor is [32, 16], nor [2, 64].
    for path, layer, decays, factored in (
        (UP, 0, 1, True), (UP, 1, 1, True), (BIAS, 1, 0, False), (PROJECTION, None, 1, False),
    ):  # fmt: skip
        param, *grads = (np.asarray(t[path] if layer is None else t[path][layer]) for t in flat)
        expected = by_hand(
            param.astype(np.float64),
            [g.astype(np.float64) for g in grads],
            setup.config.optimizer,
            rates,
            decays,
            factored,
        )
        for step, update in enumerate(expected):
            found = ours[step][path] if layer is None else ours[step][path][layer]
            np.testing.assert_allclose(found, update, rtol=2e-4, atol=ROUNDING, err_msg=path)


def test_adafactor_treats_stacked_layers_as_separate_ones_whatever_their_number():
    config = config_of("adafactor")
    config.objective.image.depth = 33  # a stack of 33 biases has two dimensions above 32
    setup = one_device(config)
    pick = (BIAS, UP, BIAS.replace("image", "text"), "logit_scale")
    flat = param_groups.flatten(setup.abstract.params)
    params = random_like(param_groups.unflatten({path: flat[path] for path in pick}), 0)
    gradients = [random_like(params, seed) for seed in (1, 2)]
    stacked = updates_of(setup.optimizer, params, gradients)[1]
    alone = updates_of(setup.optimizer, separate(params), [separate(g) for g in gradients])[1]
    for path, update in param_groups.flatten(separate(param_groups.unflatten(stacked))).items():
        np.testing.assert_allclose(update, alone[path], rtol=1e-5, atol=ROUNDING, err_msg=path)


@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_what_is_held_and_where_it_lies(name):
    setup = helpers.setup_on(config_of(name), {"replica": 2, "fsdp": 2, "tensor": 2})
    params = param_groups.flatten(setup.abstract.params)
    owned, rest = {}, []
    for path, leaf in jax.tree_util.tree_leaves_with_path(setup.abstract.opt_state):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        owner = next((p for p in params if path.endswith(f"/{p}")), None)
        if owner and leaf.shape == params[owner].shape:
            assert leaf.sharding == params[owner].sharding, path
            owned.setdefault(owner, []).append(leaf.dtype)
        else:  # of factored moments every dimension but that of the layers can be sharded
            dims = leaf.shape["/layers/" in path :] if owner else ()
            even = any(dim % 2 == 0 for dim in dims)
            assert leaf.sharding.is_fully_replicated != even, path
            assert "/layers/" not in path or leaf.sharding.spec[0] is None, path
            rest.append(leaf)
    assert set(owned) == set(params)
    assert any(not leaf.sharding.is_fully_replicated for leaf in rest) == (name == "adafactor")
    assert owned[UP] == [jnp.bfloat16 if name == "adafactor" else jnp.float32]
    sizes = sum(leaf.size for leaf in params.values())
    assert sum(leaf.size for leaf in rest) < 0.2 * sizes


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adafactor", "lion"])
def test_losses_do_not_depend_on_the_mesh_and_fall(name):
    config = config_of(name, frozen=("text/position_embedding",))
    config.optimizer.layer_decay = {"image": 0.9, "text": 1.0}
    config.optimizer.learning_rate = 1e-3 if name == "adafactor" else 2e-4
    one = helpers.train(one_device(config), 8)[1]
    sizes = {"replica": 2, "fsdp": 2, "tensor": 2}
    many = helpers.train(helpers.setup_on(config, sizes), 8)[1]
    np.testing.assert_allclose([m["loss"] for m in many], [m["loss"] for m in one], rtol=2e-3)
    assert abs(one[-1]["loss"] - one[0]["loss"]) > 1e-3


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_the_first_moment_may_be_half_as_large(name):
    """In bfloat16, all others as they were; the first update is the same within its precision."""

    def state_and_update(dtype):
        config = config_of(name)
        config.optimizer.first_moment_dtype = dtype
        optimizer = make_optimizer(config.optimizer, Units(8, None, total_steps=10))
        params = {"up": {"kernel": jnp.ones((32, 64)), "bias": jnp.zeros(64)}}
        grads = jax.tree.map(lambda x: jnp.full_like(x, 0.3), params)
        state = optimizer.init(params)
        update, state = optimizer.update(grads, state, params)
        return state, update

    (small, update), (large, expected) = (state_and_update(d) for d in ("bfloat16", None))
    halved = [
        a.dtype == jnp.bfloat16 and b.dtype == jnp.float32
        for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True)
    ]
    assert sum(halved) == 2  # kernel and bias, once each
    for a, b in zip(jax.tree.leaves(update), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-2, atol=1e-7)


def test_a_first_moment_of_unknown_dtype_is_refused():
    config = config_of("adamw")
    config.optimizer.first_moment_dtype = "float16"
    with pytest.raises(UserError, match="first_moment_dtype.*float16"):
        make_optimizer(config.optimizer, Units(8, None, total_steps=10))

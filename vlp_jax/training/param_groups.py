"""Frozen sub-trees and layer-wise learning-rate decay: the parameters to update, and how far.

A parameter is named by its path in the model, "image/encoder/layers/mlp/up/kernel". The layers of
a tower are stacked along the first axis of `encoder/layers/...`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax
import jax
import numpy as np
import optax

from vlp_jax.errors import UserError

# Where in a tower a parameter stands that belongs to no block, by the start of its path in there.
# A name that is in neither is an error: to guess would give it a learning rate without a word.
BEFORE_BLOCKS = (
    "patch_embedding",
    "token_embedding",
    "class_token",
    "registers",
    "position_embedding",
    "pre_norm",
)
AFTER_BLOCKS = ("encoder/norm", "norm", "pooling")
BLOCKS = "encoder/layers/"


def map_with_path(function: Callable[[str, Any], Any], params: Any) -> Any:
    """The tree of `function(path, leaf)`, for every parameter."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf),
        params,
    )


def flatten(params: Any) -> dict[str, Any]:
    """path -> parameter."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The tree that `flatten` took apart."""
    return flax.traverse_util.unflatten_dict(dict(flat), sep="/")


# Frozen sub-trees.
# The step differentiates by the trained parameters alone, and the optimizer never sees the frozen
# ones: they cost neither a backward pass nor optimizer state.


def is_frozen(path: str, frozen: Sequence[str]) -> bool:
    """Whether one of the regular expressions `frozen` matches the whole path."""
    return any(re.fullmatch(pattern, path) for pattern in frozen)


def split(params: Any, frozen: Sequence[str]) -> tuple[Any, Any]:
    """Splits the parameters into two trees: trained and frozen."""
    if not frozen:
        return params, {}
    parts: tuple[dict, dict] = {}, {}
    for path, leaf in flatten(params).items():
        parts[is_frozen(path, frozen)][path] = leaf
    return unflatten(parts[0]), unflatten(parts[1])


def merge(trained: Any, frozen: Any) -> Any:
    """Inverts `split`: joins both trees."""
    return unflatten({**flatten(trained), **flatten(frozen)}) if frozen else trained


def hold(paths: frozenset[str], new: Any, old: Any) -> Any:
    """Returns `new`, in which leaves whose path ends in one of `paths` are taken from `old`."""
    if not paths:
        return new
    ends = {tuple(path.split("/")) for path in paths}

    def pick(path: tuple, new: Any, old: Any) -> Any:
        keys = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
        held = any(tuple(keys[start:]) in ends for start in range(len(keys)))
        return old if held else new

    return jax.tree_util.tree_map_with_path(pick, new, old)


def check_patterns(patterns: Sequence[str], where: str) -> None:
    """Raises UserError for a pattern that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except (re.error, TypeError) as error:
            raise UserError(f"{where}: {pattern!r} is no regular expression: {error}") from error


def without_frozen(
    optimizer: optax.GradientTransformation, frozen: Sequence[str]
) -> optax.GradientTransformation:
    """`optimizer` for gradients, state and updates of the parameters that are not frozen alone."""
    if not frozen:
        return optimizer

    def init(params: Any) -> Any:
        return optimizer.init(split(params, frozen)[0])

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        return optimizer.update(split(grads, frozen)[0], state, split(params, frozen)[0])

    return optax.GradientTransformation(init, update)


# Layer-wise learning-rate decay.


def layer_factors(params: Any, decays: Mapping[str, float]) -> dict[str, float | np.ndarray]:
    """path -> factor on the learning rate, for the parameters of the towers in `decays`.

    Block i of L is layer i + 1. Parameters before the blocks are in layer 0, parameters after them
    in layer L + 1. The factor is decay ** (L + 1 - layer) (Bao et al. 2022, "BEiT", and the
    fine-tuning of He et al. 2022, "MAE", util/lr_decay.py). Stacked layers have an array of
    factors, `[L, 1, ...]`. A tower of decay 1 has no factors.

    Raises:
      UserError: there is no such tower, or it is not known where in it a parameter stands.
    """
    factors: dict[str, float | np.ndarray] = {}
    flat = flatten(params)
    for tower, decay in decays.items():
        if decay == 1:
            continue
        inside = {path[len(tower) + 1 :]: x for path, x in flat.items() if _top(path) == tower}
        if not inside:
            raise UserError(
                f"config.optimizer.layer_decay.{tower} is {decay} and the model has no parameters "
                f"under {tower!r} (it has: {_tops(flat)}); set it to 1.0"
            )
        depths = (leaf.shape[0] for path, leaf in inside.items() if path.startswith(BLOCKS))
        depth = max(depths, default=0)
        for path, leaf in inside.items():
            layer = _layer(path, depth, leaf.ndim, tower)
            factors[f"{tower}/{path}"] = decay ** (depth + 1.0 - layer)
    return factors


def _layer(path: str, depth: int, dims: int, tower: str) -> int | np.ndarray:
    if path.startswith(BLOCKS):
        # [depth, 1, ...]: it multiplies a stacked parameter layer by layer.
        return 1 + np.arange(depth).reshape(depth, *(1,) * (dims - 1))
    for names, layer in ((BEFORE_BLOCKS, 0), (AFTER_BLOCKS, depth + 1)):
        # With slashes, so that "norm" does not match "norm_tokens".
        if any(f"{path}/".startswith(f"{name}/") for name in names):
            return layer
    raise UserError(
        f"config.optimizer.layer_decay.{tower}: the layer of {tower}/{path} is not known; set the "
        "decay to 1.0, or name it in vlp_jax/training/param_groups.py"
    )


def with_layer_decay(
    optimizer: optax.GradientTransformation, decays: Mapping[str, float]
) -> optax.GradientTransformation:
    """`optimizer` with every update times its `layer_factors`: a learning rate for each layer."""
    if all(decay == 1 for decay in decays.values()):
        return optimizer

    def update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, state = optimizer.update(grads, state, params)
        factors = layer_factors(params, decays)

        def scaled(path: str, update: jax.Array) -> jax.Array:
            factor = factors.get(path, 1.0)
            # An array in another dtype would promote the update; a Python number does not.
            return update * (np.asarray(factor, update.dtype) if np.ndim(factor) else factor)

        return map_with_path(scaled, updates), state

    return optax.GradientTransformation(optimizer.init, update)


# Stacked layers, one by one.


def layer_by_layer(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """`optimizer`, which looks at dimensions, with each of stacked layers as its own parameter."""

    def grouped(params: Any) -> optax.GradientTransformation:
        def label(path: str, leaf: Any) -> str:
            # Stacks of different depths are different groups: `vmap` needs one length.
            return f"stack_of_{leaf.shape[0]}" if "/layers/" in path else "single"

        labels = map_with_path(label, params)
        return optax.partition(
            {name: optimizer if name == "single" else stack for name in jax.tree.leaves(labels)},
            labels,
        )

    stack = optax.GradientTransformation(
        lambda params: jax.vmap(optimizer.init)(params),
        lambda grads, state, params: jax.vmap(optimizer.update)(grads, state, params),
    )
    return optax.GradientTransformation(
        lambda params: grouped(params).init(params),
        lambda grads, state, params: grouped(params).update(grads, state, params),
    )


def check_groups(config: Mapping[str, Any], params: Any) -> None:
    """Raises UserError if `config.optimizer` names parameters that `params` does not have."""
    layer_factors(params, config["layer_decay"])
    flat, frozen = flatten(params), config["frozen"]
    for pattern in frozen:
        if not any(re.fullmatch(pattern, path) for path in flat):
            raise UserError(
                f"config.optimizer.frozen: {pattern!r} is the whole path of no parameter, such as "
                f"{max(flat, key=len)!r}; at the top the model has {_tops(flat)}"
            )
    if frozen and all(is_frozen(path, frozen) for path in flat):
        raise UserError(
            f"config.optimizer.frozen freezes all parameters ({_tops(flat)}); leave some to train"
        )


def _top(path: str) -> str:
    return path.partition("/")[0]


def _tops(paths: Mapping[str, Any]) -> str:
    return ", ".join(sorted({_top(path) for path in paths}))


def count(params: Any, frozen: Sequence[str]) -> tuple[int, int]:
    """How many numbers all parameters hold, and how many of them are frozen."""

    def size(tree: Any) -> int:
        return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))

    return size(params), size(split(params, frozen)[1])

"""Modules with their functions compiled: one operation after the other, tests take far longer."""

import functools

import flax.linen as nn
import jax

from vlp_jax.models.values import make_tower, tower_fields

KEY = jax.random.key(0)


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *inputs):
    """What `module` gives; equal modules are compiled once."""
    return module.apply(params, *inputs)


@functools.partial(jax.jit, static_argnums=0)
def _init(module, *inputs):
    return module.init(KEY, *inputs)


def init(module, *inputs):
    """Parameters as at the start of a training."""
    return nn.unbox(_init(module, *inputs))


@jax.jit
def _move(params):
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(7), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(tree, moved)


def perturbed(module, *inputs):
    """Parameters of which none is left at a value, such as zero, that hides a mistake."""
    return _move(init(module, *inputs))


def changed(tower, **fields):
    """The same tower with other fields, of its own or of its `TransformerConfig`."""
    return make_tower(type(tower), tower.compute, **{**tower_fields(tower), **fields})

"""All that a step changes."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import BatchSpec, Context
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel import rules
from vlp_jax.training import param_groups
from vlp_jax.training.average import NO_AVERAGE, Average
from vlp_jax.training.guard import NO_SPIKE_RULE, Guard

# What randomness is for: the third number, after seed and step, that a key is folded from.
PURPOSE_INIT, PURPOSE_LOSS = 0, 1


@flax.struct.dataclass
class TrainState:
    """State just before batch `step`.

    Attributes:
      step: int32, steps done.
      params: parameters, float32.
      opt_state: the optimizer's.
      ema: exponential moving average of all or some of `params`, see `Average`; an empty dict if
        there is none.
      guard: what the rule about spikes of the loss remembers; an empty dict if there is none.
      objective: what the objective keeps that is neither trained nor constant, see
        `Objective.init_state`; an empty dict for most.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    guard: Any = flax.struct.field(default_factory=dict)
    objective: Any = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and export: their averages where there are any."""
        if jax.tree.structure(self.ema) == jax.tree.structure(self.params):
            return self.ema
        return param_groups.merge(self.params, self.ema)


def context_of(state: TrainState, rng: jax.Array) -> Context:
    """What the loss of the next batch is told of a state."""
    return Context(
        rng,
        step=state.step,
        ema_params=state.eval_params if state.ema else None,
        state=state.objective,
    )


def key_for(seed: int, step: jax.Array | int, purpose: int) -> jax.Array:
    """The random key of (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def _init(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    seed: int,
    average: Average,
    guard: Guard,
) -> TrainState:
    params = nn.unbox(objective.init(key_for(seed, 0, PURPOSE_INIT), batch_spec))
    kept = nn.unbox(objective.init_state(batch_spec))
    return TrainState(
        jnp.int32(0), params, optimizer.init(params), average.init(params), guard.init(), kept
    )


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    mesh: Mesh,
    average: Average = NO_AVERAGE,
    guard: Guard = NO_SPIKE_RULE,
) -> TrainState:
    """Shapes, dtypes and shardings of the state; no array is made.

    Whatever in the optimizer's state has the shape of a parameter lies as that parameter does, and
    what else belongs to one is spread as `rules.leaf_sharding` spreads it.
    """
    with rules.use_mesh(mesh):  # what a device does not hold may be refused
        boxed = jax.eval_shape(lambda: objective.init(key_for(0, 0, PURPOSE_INIT), batch_spec))
        shapes = jax.eval_shape(lambda: _init(objective, optimizer, batch_spec, 0, average, guard))
        kept = jax.eval_shape(lambda: objective.init_state(batch_spec))
    shardings = rules.param_shardings(boxed, mesh)
    whole = mesh_lib.replicated(mesh)

    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return TrainState(
        step=place(shapes.step, whole),
        params=jax.tree.map(place, shapes.params, shardings),
        opt_state=jax.tree.map(
            place, shapes.opt_state, _like_params(shapes.opt_state, boxed, mesh)
        ),
        ema=jax.tree.map(place, shapes.ema, average.chosen(shardings)),
        guard=jax.tree.map(lambda leaf: place(leaf, whole), shapes.guard),
        objective=jax.tree.map(place, shapes.objective, rules.param_shardings(kept, mesh)),
    )


def _like_params(tree: Any, boxed: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf of an optimizer's state.

    A leaf whose path ends in that of a parameter lies as that parameter does if it has its shape,
    and by the names of the dimensions that it has left if not (a factored moment). A leaf that
    belongs to no parameter lies whole. (`optax.tree_map_params` does not hold a state that is
    partitioned by the names of the parameters, as Muon's is.)
    """
    params = dict(jax.tree_util.tree_leaves_with_path(boxed, is_leaf=rules.is_boxed))

    def sharding(path: tuple, leaf: Any) -> Any:
        ends = (params.get(path[start:]) for start in range(len(path)))
        param = next((found for found in ends if found is not None), None)
        if param is None:
            return mesh_lib.replicated(mesh)
        names = _names_left(rules.names_of(param), nn.unbox(param).shape, leaf.shape)
        return rules.leaf_sharding(names, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names_left(names: tuple, shape: tuple[int, ...], left: tuple[int, ...]) -> tuple:
    """The names of the dimensions `left` of a parameter of `shape`, one of which may be gone."""
    if left == shape:
        return names
    for gone in reversed(range(len(shape))):
        if left == shape[:gone] + shape[gone + 1 :]:
            return names[:gone] + names[gone + 1 :]
    return (*names[:1], *(None,) * len(left))[: len(left)]


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    abstract: TrainState,
    seed: int,
    average: Average = NO_AVERAGE,
    guard: Guard = NO_SPIKE_RULE,
) -> TrainState:
    """A fresh state, made in place: each device computes its own part and no more."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        lambda: _init(objective, optimizer, batch_spec, seed, average, guard),
        out_shardings=shardings,
    )()

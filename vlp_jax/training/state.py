"""The train state: everything that a step changes, with its initial values and shardings."""

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
from vlp_jax.training.step_rules import Average, Guard

# A key is folded from (seed, purpose, step), so initialization and losses never share randomness.
PURPOSE_INIT, PURPOSE_LOSS = 0, 1


@flax.struct.dataclass
class TrainState:
    """The state of training just before batch `step`.

    Attributes:
      step: int32, steps done.
      params: parameters, float32.
      opt_state: the state of the optimizer.
      ema: exponential moving average of all or some of `params` (see `Average`); {} without one.
      guard: running statistics of the loss, for the spike rule (see `Guard`); {} without the rule.
      objective: arrays of the objective that are neither trained nor constant, such as a queue (see
        `Objective.init_state`); {} for most objectives.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    ema: Any
    guard: Any = flax.struct.field(default_factory=dict)
    objective: Any = flax.struct.field(default_factory=dict)

    @property
    def eval_params(self) -> Any:
        """The parameters to evaluate and export: the average of each one that is averaged."""
        if jax.tree.structure(self.ema) == jax.tree.structure(self.params):
            return self.ema
        return param_groups.merge(self.params, self.ema)


def context_of(state: TrainState, rng: jax.Array) -> Context:
    """Makes the `Context` that the loss of the next batch gets."""
    return Context(
        rng,
        step=state.step,
        ema_params=state.eval_params if state.ema else None,
        state=state.objective,
    )


def key_for(seed: int, step: jax.Array | int, purpose: int) -> jax.Array:
    """Returns the random key of (seed, step, purpose)."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), purpose), step)


def _init(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    seed: int,
    average: Average,
    guard: Guard,
) -> TrainState:
    # The boxes hold the names of axes, which `abstract_state` has used. The state holds bare
    # arrays.
    params = nn.unbox(objective.init(key_for(seed, 0, PURPOSE_INIT), batch_spec))
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(params),
        ema=average.init(params),
        guard=guard.init(),
        objective=nn.unbox(objective.init_state(batch_spec)),
    )


def abstract_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    mesh: Mesh,
    average: Average,
    guard: Guard,
) -> TrainState:
    """Computes shapes, dtypes and shardings of the state, without making an array.

    Leaves of the optimizer state that belong to a parameter are sharded by its names of axes.
    """
    with rules.use_mesh(mesh):  # a module may refuse the mesh, as attention kernels do
        boxed = jax.eval_shape(lambda: objective.init(key_for(0, 0, PURPOSE_INIT), batch_spec))
        # The seed is of no account: only shapes come out.
        shapes = jax.eval_shape(lambda: _init(objective, optimizer, batch_spec, 0, average, guard))
        objective_state = jax.eval_shape(lambda: objective.init_state(batch_spec))
    whole, params = mesh_lib.replicated(mesh), rules.param_shardings(boxed, mesh)
    shardings = TrainState(
        step=whole,
        params=params,
        opt_state=_like_params(shapes.opt_state, boxed, mesh),
        ema=average.chosen(params),
        guard=jax.tree.map(lambda leaf: whole, shapes.guard),
        objective=rules.param_shardings(objective_state, mesh),
    )
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def _like_params(tree: Any, boxed: Any, mesh: Mesh) -> Any:
    """Returns a sharding for each leaf of an optimizer state.

    A leaf belongs to the parameter whose path ends the leaf's path, and is sharded by the names of
    the dimensions that it keeps. A leaf that belongs to no parameter is replicated.
    """
    # `optax.tree_map_params` does not handle optax.partition, which Muon's optimizer is.
    params = dict(jax.tree_util.tree_leaves_with_path(boxed, is_leaf=rules.is_boxed))

    def sharding(path: tuple, leaf: Any) -> Any:
        # The longest matching suffix comes first: "mu/image/head/kernel" before "head/kernel".
        owners = (params.get(path[start:]) for start in range(len(path)))
        param = next((owner for owner in owners if owner is not None), None)
        if param is None:
            return mesh_lib.replicated(mesh)
        names = _names_left(rules.names_of(param), nn.unbox(param).shape, leaf.shape)
        return rules.leaf_sharding(names, leaf.shape, mesh)

    return jax.tree_util.tree_map_with_path(sharding, tree)


def _names_left(names: tuple, shape: tuple[int, ...], left: tuple[int, ...]) -> tuple:
    """The axis names of a leaf of shape `left`, made from a parameter of `shape` by a reduction."""
    if left == shape:
        return names
    for gone in reversed(range(len(shape))):
        if left == shape[:gone] + shape[gone + 1 :]:
            return names[:gone] + names[gone + 1 :]
    # Neither the parameter nor a reduction of it: only the first axis (stacked layers) has a name.
    return (*names[:1], *(None,) * len(left))[: len(left)]


def init_state(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_spec: BatchSpec,
    abstract: TrainState,
    seed: int,
    average: Average,
    guard: Guard,
) -> TrainState:
    """Makes the initial state in place: each device computes only its own shard."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(
        lambda: _init(objective, optimizer, batch_spec, seed, average, guard),
        out_shardings=shardings,
    )()

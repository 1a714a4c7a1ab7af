"""Evaluates an objective's loss on a split that it is not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from vlp_jax.errors import UserError
from vlp_jax.evaluators.attacks import with_attacks
from vlp_jax.evaluators.base import NUMBER, Evaluator, Pairs, Resources
from vlp_jax.evaluators.class_lists import numbered
from vlp_jax.objectives import Objective
from vlp_jax.objectives.base import SEPARATOR, Context, Function, Metrics
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch

SEED = 0  # of random draws of the loss, such as masks: fixed, to compare steps of a run
EACH, WHOLE = "loss_of_each", "loss_of_batch"  # an objective has one of these functions


def evaluator_functions(objective: Objective) -> dict[str, Function]:
    """Returns the objective's functions, its loss on examples, and attacks on its classifiers.

    Nothing is compiled until a function is called.
    """
    return {**loss_functions(objective), **with_attacks(objective.functions())}


def loss_functions(objective: Objective) -> dict[str, Function]:
    """Makes the function that `Loss` calls, for `compile_functions`.

    `loss_of_each(params, batch)` returns metric -> (sum, count), float32 [batch] each: every
    example by itself. Random draws depend on the example's number alone. An objective that couples
    the batch has `loss_of_batch` instead: metric -> (sum, count), scalars.
    """

    def metrics(params: Any, fields: dict[str, Array], number: Array) -> Metrics:
        """Computes the metrics with a fresh state, without the average of parameters."""
        key = jax.random.fold_in(jax.random.key(SEED), number)
        spec = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in fields.items()}
        state = nn.unbox(objective.init_state(spec))
        return objective.loss(params, fields, Context(key, train=False, state=state))[1].metrics

    def of_batch(params: Any, batch: dict[str, Array]) -> Metrics:
        fields = {name: value for name, value in batch.items() if name != NUMBER}
        # The number of the first example stands for the batch.
        return metrics(params, fields, batch[NUMBER][0])

    def of_each(params: Any, batch: dict[str, Array]) -> Metrics:
        def one(example: dict[str, Array], number: Array) -> Metrics:
            alone = {name: value[None] for name, value in example.items()}
            found = metrics(params, alone, number)
            return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), found)

        fields = {name: value for name, value in batch.items() if name != NUMBER}
        # Within vmap a batch has one example, which cannot be split over devices. The constraints
        # are dropped there; XLA splits the dimension that vmap adds.
        with nn.logical_axis_rules(()):
            return jax.vmap(one)(fields, batch[NUMBER])

    if objective.couples_batch:
        return {WHOLE: Function(of_batch, {}, "metric -> (sum, count)")}
    return {EACH: Function(of_each, {}, "metric -> (sum, count), of each example")}


class Loss(Evaluator):
    """Computes the loss and the other metrics of the objective over a split.

    The objective's randomness of training is off, such as stochastic depth and label smoothing.

    A loss that is a mean over examples is exact: every example counts once, in batches of any size.
    A loss that couples the batch (a contrastive loss) is the mean over full batches, in the order
    of the source. An incomplete last batch is left out, and so is a batch with an example that
    cannot be used.

    Args:
      data: the examples.
      batch_size: batch size of a loss that couples the batch; None for the evaluation's, which is
        the training's on the run's devices. Losses of different batch sizes cannot be compared.
      extra_data: for a composite with several datasets: name -> data, as in `config.extra_data`.
        They are read side by side, up to the end of the shortest.
    """

    needs = ()
    reads_text = True

    def __init__(
        self,
        *,
        data: Mapping[str, Any],
        resources: Resources,
        batch_size: int | None = None,
        extra_data: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        if batch_size is not None:
            mesh_lib.check_batch_size(batch_size, resources.mesh, "batch_size of the loss")
            resources = dataclasses.replace(resources, batch_size=batch_size)
        self._resources = resources
        self._pipelines = {"": resources.pipeline(data)}
        for name, more in (extra_data or {}).items():
            self._pipelines[f"{name}{SEPARATOR}"] = resources.pipeline(more)
        self._coupled = WHOLE in resources.functions
        shortest = min(len(pipeline) for pipeline in self._pipelines.values())
        if self._coupled and shortest < resources.batch_size:
            raise UserError(
                f"this loss is of whole batches of {resources.batch_size}, and the split has "
                f"{shortest} examples; take more of them (limit) or a smaller batch_size"
            )

    def pairs(self, params: Any) -> Pairs:
        """Yields each metric, and `examples`, the number counted; UserError if there are none."""
        function = self._resources.functions[WHOLE if self._coupled else EACH]
        sums: dict[str, np.ndarray] = {}
        examples = 0
        for batch in numbered(self._batches()):
            fields = put_batch(batch, self._resources.mesh)
            rest = {"mask": fields.pop("mask")}
            metrics, rest = jax.device_get(function(params, fields, rest))
            keep = rest["mask"]
            if self._coupled and not keep.all():
                continue
            examples += int(keep.sum())
            for name, pair in metrics.items():
                pair = np.stack([np.asarray(x, np.float64) for x in pair])
                pair = pair if self._coupled else pair[:, keep].sum(axis=1)
                sums[name] = sums.get(name, 0) + pair
        if not examples:
            raise UserError("no batch of the split is full and without a damaged example")
        for name, (total, count) in sums.items():
            yield name, float(total / count)
        yield "examples", float(examples)

    def _batches(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields joined batches of all datasets. An example counts if no dataset masks it."""
        streams = [pipeline.batches() for pipeline in self._pipelines.values()]
        for parts in zip(*streams, strict=False):
            joined = {
                f"{prefix}{name}": value
                for prefix, batch in zip(self._pipelines, parts, strict=True)
                for name, value in batch.items()
                if name != "mask"
            }
            yield {**joined, "mask": np.logical_and.reduce([batch["mask"] for batch in parts])}

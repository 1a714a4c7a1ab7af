"""A weighted sum of objectives whose towers share parameters, such as SLIP's or "CLIP plus MAE"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.objectives.base import Batch, BatchSpec, Metrics, Objective, Params

SEPARATOR = "/"  # between the name of a further dataset and that of its field


@dataclasses.dataclass(frozen=True)
class Part:
    """One objective of a sum.

    Attributes:
      name: what its metrics are known by.
      weight: factor on its loss.
      data: the name of the dataset in `config.extra_data` that feeds it; None for `config.data`.
    """

    name: str
    objective: Objective
    weight: float
    data: str | None = None

    def fields(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a batch, or of its spec, that are this part's, under their plain names.

        Raises:
          ValueError: the batch has none of its dataset.
        """
        if self.data is None:
            return {name: value for name, value in batch.items() if SEPARATOR not in name}
        prefix = self.data + SEPARATOR
        found = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        if not found:
            raise ValueError(
                f"part {self.name!r} is fed from {self.data!r}, which config.extra_data lacks"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Composite:
    """The sum of its parts' losses, each times its weight.

    Parameters with the same path are the same: parts that both have an `image` tower train one.
    """

    parts: tuple[Part, ...]

    @property
    def model(self) -> nn.Module:
        """Of the first part."""
        return self.parts[0].objective.model

    @property
    def couples_batch(self) -> bool:
        """Whether any part does."""
        return any(part.objective.couples_batch for part in self.parts)

    @property
    def compute_dtype(self) -> Any:
        """Of the first part."""
        return self.parts[0].objective.compute_dtype

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Fresh parameters of all parts; shared ones as the first part that has them makes them.

        Raises:
          ValueError: two parts disagree on the shape of a parameter, or a part has no data.
        """
        params: Params = {}
        for index, part in enumerate(self.parts):
            key = jax.random.fold_in(rng, index) if index else rng
            merge_trees(params, part.objective.init(key, part.fields(batch_spec)), part.name)
        return params

    def loss(
        self, params: Params, batch: Batch, rng: PRNGKeyArray, train: bool
    ) -> tuple[Float[Array, ""], Metrics]:
        """The weighted sum; metrics are named after the part, "NAME/loss" and so on."""
        total, metrics = jnp.float32(0), {}
        for index, part in enumerate(self.parts):
            key = jax.random.fold_in(rng, index)
            value, own = part.objective.loss(params, part.fields(batch), key, train)
            total += part.weight * value
            metrics.update({f"{part.name}/{name}": pair for name, pair in own.items()})
        return total, {**metrics, "loss": (total, jnp.float32(1))}

    def functions(self) -> dict[str, Callable[..., Array]]:
        """Those of all parts; where two have the same name, that of the first."""
        functions: dict[str, Callable[..., Array]] = {}
        for part in self.parts:
            functions = {**part.objective.functions(), **functions}
        return functions

    def flops_per_example(self, batch_spec: BatchSpec) -> float:
        """Forward FLOPs of one example of each part."""
        return sum(part.objective.flops_per_example(part.fields(batch_spec)) for part in self.parts)


def merge_trees(tree: dict[str, Any], more: Mapping[str, Any], who: str, path: str = "") -> None:
    """Puts what `tree` lacks of `more` into it.

    Raises:
      ValueError: a leaf is in both with different shapes, or a leaf in one and a branch in the
        other; names its path and `who` brought the second.
    """
    for key, value in more.items():
        where = f"{path}{key}"
        if key not in tree:
            tree[key] = value
        elif isinstance(tree[key], dict) and isinstance(value, Mapping):
            tree[key] = dict(tree[key])
            merge_trees(tree[key], value, who, f"{where}/")
        else:
            shapes = [getattr(_bare(leaf), "shape", "a branch") for leaf in (tree[key], value)]
            if shapes[0] != shapes[1]:
                raise ValueError(
                    f"the parts do not share {where}: its shape is {shapes[0]}, and {shapes[1]} "
                    f"in part {who!r}; give their towers the same sizes"
                )


def _bare(leaf: Any) -> Any:
    return getattr(leaf, "value", leaf)


def make_composite(
    make_part: Callable[..., Objective],
    parts: Mapping[str, Mapping[str, Any]],
    **shared: Any,
) -> Composite:
    """`Composite` from `config.objective`.

    Args:
      make_part: makes the objective of a section; it is handed `where` and what is `shared`.
      parts: by name, the section of an objective with two keys more: `weight` (default 1) and
        `data`, the name of a dataset in `config.extra_data` (default: `config.data`).

    Raises:
      ValueError: no parts, or a weight that is not positive.
    """
    if not parts:
        raise ValueError("a composite objective needs parts")
    made = []
    for name, section in parts.items():
        section = dict(section.items())
        weight, data = float(section.pop("weight", 1.0)), section.pop("data", None)
        if weight <= 0:
            raise ValueError(f"the weight of part {name!r} must be positive, not {weight}")
        objective = make_part(section, where=f"config.objective.parts.{name}", **shared)
        made.append(Part(name, objective, weight, data))
    return Composite(tuple(made))

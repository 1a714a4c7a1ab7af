"""A weighted sum of objectives whose towers share parameters, such as SLIP's or "CLIP plus MAE"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from vlp_jax.objectives.base import (
    SEPARATOR,
    Batch,
    BatchSpec,
    Context,
    Examples,
    Field,
    Function,
    LossOutput,
    Objective,
    Params,
    Part,
    State,
)
from vlp_jax.objectives.shared_forward import shared_forward
from vlp_jax.objectives.weight import StepsOf, Weight


# Every objective calls its image tower `image`, so that parts share it, and so that
# `config.init_from` needs no table of names between our own models.
@dataclasses.dataclass(frozen=True)
class Composite(Objective):
    """The sum of its parts' losses, each times its weight.

    Parameters with the same path are the same: parts that both have an `image` tower train one, and
    what it computes of the same images it computes once (`shared_forward`).

    Attributes:
      members: the parts, of which none is a sum itself.
    """

    members: tuple[Part, ...]

    @property
    def model(self) -> nn.Module:
        """Of the first part."""
        return self.members[0].objective.model

    @property
    def couples_batch(self) -> bool:
        """Whether any part does."""
        return any(part.objective.couples_batch for part in self.members)

    @property
    def compute_dtype(self) -> Any:
        """Of the first part."""
        return self.members[0].objective.compute_dtype

    @property
    def reads(self) -> Mapping[str, Field]:
        """Those of all parts, as the batch names them."""
        return {
            name if part.data is None else f"{part.data}{SEPARATOR}{name}": field
            for part in self.members
            for name, field in part.objective.reads.items()
        }

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Fresh parameters of all parts; shared ones as the first part that has them makes them.

        Raises:
          ValueError: two parts disagree on the shape of a parameter, or a part has no data.
        """
        params: Params = {}
        for index, part in enumerate(self.members):
            key = jax.random.fold_in(rng, index) if index else rng
            merge_trees(params, part.objective.init(key, part.fields(batch_spec)), part.name)
        return params

    def init_state(self, batch_spec: BatchSpec) -> State:
        """The states of the parts that have one, by their keys."""
        states = {
            part.key: part.objective.init_state(part.fields(batch_spec)) for part in self.members
        }
        return {name: state for name, state in states.items() if state}

    def draw(self, batch: Batch, context: Context) -> Examples:
        """What each part draws, by its key."""
        return {
            part.key: part.objective.draw(part.fields(batch), context.of_part(index, part))
            for index, part in enumerate(self.members)
        }

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """What each part computes, by its key. They share what their towers compute."""
        with shared_forward():
            return {
                part.key: part.objective.forward(
                    params, batch[part.key], context.of_part(index, part)
                )
                for index, part in enumerate(self.members)
            }

    def reduce(
        self, params: Params, examples: Examples, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """The weighted sum; metrics are named after the part, "NAME/loss" and so on.

        In evaluation all weights are those that they rise to.
        """
        total, metrics, states = jnp.float32(0), {}, dict(context.state)
        for index, part in enumerate(self.members):
            own = context.of_part(index, part)
            value, output = part.objective.reduce(params, examples[part.key], own)
            total += (part.weight.at(context.step) if context.train else part.weight.value) * value
            metrics |= {f"{part.name}/{name}": pair for name, pair in output.metrics.items()}
            states |= {part.key: output.state} if output.state else {}
        return total, LossOutput({**metrics, "loss": (total, jnp.float32(1))}, states)

    def functions(self) -> dict[str, Function]:
        """Those of all parts; where two have the same name, that of the first."""
        functions: dict[str, Function] = {}
        for part in self.members:
            functions = {**part.objective.functions(), **functions}
        return functions

    def parts(self) -> dict[str, Part]:
        """The parts by name."""
        return {part.name: part for part in self.members}

    def switches(self) -> tuple[int, ...]:
        """The steps at which parts begin or end."""
        ends = (step for part in self.members for step in (part.weight.begin, part.weight.end))
        return tuple(sorted({step for step in ends if step}))

    def at(self, step: int) -> Self:
        """The sum of the parts whose weight is not 0 at this step.

        Raises:
          ValueError: there is none.
        """
        members = tuple(part for part in self.members if part.weight.is_on(step))
        if not members:
            raise ValueError(
                f"the weights of all parts are 0 at step {step:,}: let one of them begin earlier "
                "or end later"
            )
        return dataclasses.replace(self, members=members)


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
    steps_of: StepsOf | None = None,
) -> Composite:
    """`Composite` from `config.objective`.

    Args:
      make_part: makes the objective of a section; it is handed `where`.
      parts: by name, the section of an objective with two keys more: `weight` (default 1; see
        `Weight.of`) and `data`, the name of a dataset in `config.extra_data` (default:
        `config.data`).
      steps_of: see `Weight.of`.

    Raises:
      ValueError: no parts, or weights that do not go together.
      UserError: a weight that is none.
    """
    if not parts:
        raise ValueError("a composite objective needs parts")
    made: list[Part] = []
    for name, section in parts.items():
        section, where = dict(section.items()), f"config.objective.parts.{name}"
        weight = Weight.of(section.pop("weight", 1.0), steps_of, f"{where}.weight")
        data = section.pop("data", None)
        objective = make_part(section, where=where)
        for inner in objective.parts().values():  # of a sum in a sum, the parts themselves
            made.append(
                Part(
                    f"{name}/{inner.name}" if inner.name else name,
                    inner.objective,
                    weight * inner.weight,
                    inner.data or data,
                )
            )
    return Composite(tuple(made))

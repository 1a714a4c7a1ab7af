"""A weighted sum of objectives whose towers share parameters, such as SLIP's or "CLIP plus MAE"."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state
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
from vlp_jax.objectives.weight import StepsOf, Weight


@contextlib.contextmanager
def shared_forward() -> Iterator[None]:
    """Makes equal calls of a module's shared methods only once, within this context.

    A module lists its shared methods in a class attribute `SHARED`: method -> names of the fields
    that do not change the method's result. Two calls are equal if the other fields, the parameters
    and the arguments are the same. Random keys are not compared: every caller gets the stochastic
    depth of the first call.
    """
    results: dict[Hashable, tuple[Any, Any]] = {}  # key of a call -> (trace it ran in, its result)

    def intercept(
        call: Callable[..., Any], args: tuple, kwargs: dict, context: nn.module.InterceptorContext
    ) -> Any:
        module, method = context.module, context.method_name
        without = getattr(module, "SHARED", {}).get(method)
        if without is None:
            return call(*args, **kwargs)
        given = (module.variables.get("params"), args, kwargs)
        key = (
            method,
            _settings(module, without),
            *(_Same(leaf) for leaf in jax.tree.leaves(given, is_leaf=lambda x: x is None)),
            jax.tree.structure(given),
        )
        # A tracer from the body of a scan must not be used outside of it (a leaked tracer), so a
        # result counts only within the trace that computed it.
        now = get_opaque_trace_state()
        if key not in results or results[key][0] != now:
            results[key] = now, call(*args, **kwargs)
        return results[key][1]

    with nn.intercept_methods(intercept):
        yield


def _settings(module: nn.Module, without: tuple[str, ...]) -> tuple[Hashable, ...]:
    """Returns the class of a module and its fields, except the ones named in `without`."""
    names = {field.name for field in dataclasses.fields(module)} - {"parent", "name", *without}
    return (type(module), *((name, getattr(module, name)) for name in sorted(names)))


class _Same:
    """Compares plain values by value, methods by their objects, and arrays by identity."""

    def __init__(self, value: Any):
        self._value = value  # keeps the array alive, so that its id is not given to another
        if inspect.ismethod(value):
            self._key = (value.__func__, value.__self__)
        elif value is None or isinstance(value, bool | int | float | str):
            self._key = value
        else:
            self._key = id(value)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self._key == other._key


# Every objective calls its image tower `image`, so that parts share it, and so that
# `config.init_from` needs no table of names between our own models.
@dataclasses.dataclass(frozen=True)
class Composite(Objective):
    """A weighted sum of the losses of its parts; no member is a sum itself.

    Parameters with the same path are shared: parts that both have an `image` tower train one tower.
    A shared tower computes the same images only once (`shared_forward`).
    """

    members: tuple[Part, ...]

    @property
    def model(self) -> nn.Module:
        """The model of the first part."""
        return self.members[0].objective.model

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of any part couples the examples of a batch."""
        return any(part.objective.couples_batch for part in self.members)

    @property
    def compute_dtype(self) -> Any:
        """The compute dtype of the first part."""
        return self.members[0].objective.compute_dtype

    @property
    def reads(self) -> Mapping[str, Field]:
        """The fields that all parts read, by their names in a batch."""
        return {
            name if part.data is None else f"{part.data}{SEPARATOR}{name}": field
            for part in self.members
            for name, field in part.objective.reads.items()
        }

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Makes the parameters of all parts. The first part that has a shared one initializes it.

        Raises ValueError if two parts disagree on a shape, or a part has no data.
        """
        params: Params = {}
        for index, part in enumerate(self.members):
            # The first part gets the key itself, so its parameters are what it has alone, outside
            # of a sum.
            key = jax.random.fold_in(rng, index) if index else rng
            merge_trees(params, part.objective.init(key, part.fields(batch_spec)), part.name)
        return params

    def init_state(self, batch_spec: BatchSpec) -> State:
        """Makes the states of the parts that have a state, by the keys of the parts."""
        states = {
            part.key: part.objective.init_state(part.fields(batch_spec)) for part in self.members
        }
        return {name: state for name, state in states.items() if state}

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Calls `draw` of each part; returns the results by the keys of the parts."""
        return {
            part.key: part.objective.draw(part.fields(batch), context.of_part(index, part))
            for index, part in enumerate(self.members)
        }

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Calls `forward` of each part, with shared towers; returns the results by key."""
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
        """Computes the weighted sum. Metrics are called PART/NAME, such as "mae/loss".

        In evaluation each weight has its full value, so scores of different steps can be compared.
        """
        total, metrics, states = jnp.float32(0), {}, dict(context.state)
        for index, part in enumerate(self.members):
            value, output = part.objective.reduce(
                params, examples[part.key], context.of_part(index, part)
            )
            total += (part.weight.at(context.step) if context.train else part.weight.value) * value
            metrics |= {f"{part.name}/{name}": pair for name, pair in output.metrics.items()}
            states |= {part.key: output.state} if output.state else {}
        return total, LossOutput({**metrics, "loss": (total, jnp.float32(1))}, states)

    def functions(self) -> dict[str, Function]:
        """Returns the functions of all parts. Of two with the same name the first part's counts."""
        functions: dict[str, Function] = {}
        for part in self.members:
            # Earlier parts come last in the merge, so they win.
            functions = {**part.objective.functions(), **functions}
        return functions

    def parts(self) -> dict[str, Part]:
        """Returns the parts by name."""
        return {part.name: part for part in self.members}

    def switches(self) -> tuple[int, ...]:
        """Returns the steps at which parts begin or end, in order."""
        ends = (step for part in self.members for step in (part.weight.begin, part.weight.end))
        return tuple(sorted({step for step in ends if step}))

    def at(self, step: int) -> Objective:
        """Returns the sum of the parts whose weight is not 0 at `step`; ValueError for none."""
        members = tuple(part for part in self.members if part.weight.is_on(step))
        if not members:
            raise ValueError(
                f"the weights of all parts are 0 at step {step:,}: let one of them begin earlier "
                "or end later"
            )
        return dataclasses.replace(self, members=members)


def merge_trees(tree: dict[str, Any], more: Mapping[str, Any], who: str, path: str = "") -> None:
    """Adds to `tree`, in place, the leaves that it lacks of `more`, which is of the part `who`.

    Raises ValueError if the trees hold different shapes, or a leaf and a branch, at the same path.
    """
    for key, value in more.items():
        where = f"{path}{key}"
        if key not in tree:
            tree[key] = value
        elif isinstance(tree[key], dict) and isinstance(value, Mapping):
            tree[key] = dict(tree[key])  # a copy, because this branch belongs to a part's own tree
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
    """Makes the `Composite` that `config.objective` describes.

    Args:
      make_part: makes the objective of a section: `make_part(section, where=...)`.
      parts: name -> the section of an objective, with two further keys: `weight` (default 1; see
        `Weight.of`) and `data`, the name of a dataset in `config.extra_data` (default:
        `config.data`).
      steps_of: see `Weight.of`.

    Raises:
      ValueError: no parts, or weights of nested sums that both change during the run.
      UserError: an invalid weight.
    """
    if not parts:
        raise ValueError("a composite objective needs parts")
    made: list[Part] = []
    for name, section in parts.items():
        section, where = dict(section.items()), f"config.objective.parts.{name}"
        weight = Weight.of(section.pop("weight", 1.0), steps_of, f"{where}.weight")
        data = section.pop("data", None)
        objective = make_part(section, where=where)
        for inner in objective.parts().values():  # flattens a sum within a sum
            made.append(
                Part(
                    f"{name}/{inner.name}" if inner.name else name,
                    inner.objective,
                    weight * inner.weight,
                    inner.data or data,
                )
            )
    return Composite(tuple(made))

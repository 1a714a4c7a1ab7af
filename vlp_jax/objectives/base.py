"""The interface of a task to the loop, the evaluators and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from vlp_jax.objectives.weight import Weight

Params = Any
State = Any
Batch = Mapping[str, Array]
BatchSpec = Mapping[str, jax.ShapeDtypeStruct]  # of the global batch
Metrics = dict[str, tuple[Array, Array]]  # name -> (sum, count); merged by adding both
Examples = Any  # a pytree of arrays whose first dimension is the batch

PIXELS, TOKENS, LABELS = "pixels", "tokens", "labels"
SEPARATOR = "/"  # between the name of a further dataset and that of its field


@dataclasses.dataclass(frozen=True)
class Field:
    """Describes a field of an example that an objective reads.

    Attributes:
      kind: "pixels", [height, width, 3], in [0, 255]; "tokens", ids as many as the text is long; or
        "labels", the number of a class or the share of each.
      shape: of one example; of labels that of a number, ().
      dtype: of the data; of labels that of a number.
      classes: of labels, how many there are.
      told_by: of labels, the key of the config that says how many there are.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: Any = jnp.int32
    classes: int | None = None
    told_by: str = ""

    @classmethod
    def pixels(cls, image_size: tuple[int, int]) -> Field:
        """The field of a model that takes images of this height and width."""
        return cls(PIXELS, (*image_size, 3), jnp.uint8)

    @classmethod
    def tokens(cls, length: int) -> Field:
        """The field of a model that takes texts of so many tokens."""
        return cls(TOKENS, (length,))

    @classmethod
    def labels(cls, classes: int, told_by: str) -> Field:
        """The field of a model that tells so many classes."""
        return cls(LABELS, classes=classes, told_by=told_by)

    def check(self, name: str, spec: jax.ShapeDtypeStruct) -> None:
        """Raises ValueError if a field of a batch is not what is read."""
        shape = tuple(spec.shape[1:])
        found = f"{jnp.dtype(spec.dtype).name}{list(shape)}"
        if self.kind == LABELS:
            hard = jnp.issubdtype(spec.dtype, jnp.integer) and not shape
            soft = jnp.issubdtype(spec.dtype, jnp.floating) and len(shape) == 1
            if not hard and not soft:
                raise ValueError(f"{name!r} holds no classes: it is {found} an example")
            if soft and shape[0] != self.classes:
                raise ValueError(
                    f"{name!r} has shares of {shape[0]} classes, and {self.told_by} is "
                    f"{self.classes}"
                )
        elif self.kind == PIXELS and len(shape) == 3 and shape != self.shape:
            raise ValueError(
                f"{name!r} has {shape[0]} x {shape[1]} pixels, and the model takes "
                f"{self.shape[0]} x {self.shape[1]}"
            )
        elif shape != self.shape:
            wanted = f"{jnp.dtype(self.dtype).name}{list(self.shape)}"
            raise ValueError(f"{name!r} is {found} an example, and the model takes {wanted}")


@dataclasses.dataclass(frozen=True, eq=False)  # so that it can be jitted
class Function:
    """Something that a model computes for evaluators, exports and users.

    Attributes:
      call: `call(params, array)`, or of several fields `call(params, {name: array})`.
      inputs: the fields that it takes -> their kinds; empty for one that takes none of a batch.
      output: what it gives, in words.
    """

    call: Callable[..., Any]
    inputs: Mapping[str, str]
    output: str

    def __call__(self, params: Params, inputs: Any, **settings: Any) -> Any:
        """Computes it, with other settings than its defaults if any are given."""
        return self.call(params, inputs, **settings)


def of_images(call: Callable[..., Array], output: str) -> Function:
    """A function of images with values in [0, 255]."""
    return Function(call, {"image": PIXELS}, output)


def of_texts(call: Callable[..., Array], output: str) -> Function:
    """A function of token ids."""
    return Function(call, {"text": TOKENS}, output)


@dataclasses.dataclass(frozen=True)
class Context:
    """Tells a loss what it needs beside parameters and batch.

    Attributes:
      rng: the key of this step.
      train: whether it is a step of training; otherwise nothing is drawn that training alone wants.
      step: steps done before this batch.
      ema_params: the moving average of the parameters before this step; None if there is none.
      state: what `init_state` made and the last loss returned; a fresh one in evaluation.
    """

    rng: PRNGKeyArray
    train: bool = True
    step: Int[Array, ""] | int = 0
    ema_params: Params | None = None
    state: State = dataclasses.field(default_factory=dict)

    def of_part(self, index: int, part: Part) -> Context:
        """The same for a part of a composite, with randomness and state of its own."""
        rng = jax.random.fold_in(self.rng, index)
        return dataclasses.replace(self, rng=rng, state=self.state.get(part.key, {}))


class LossOutput(NamedTuple):
    """Holds the results of a loss beside its value.

    Attributes:
      metrics: name -> (sum, count).
      state: for the next step; empty for a loss that has none.
    """

    metrics: Metrics
    state: State = {}


@dataclasses.dataclass(frozen=True)
class Part:
    """One objective of a sum.

    Attributes:
      name: what its metrics are known by; "" for an objective that is no sum.
      weight: factor on its loss.
      data: the name of the dataset in `config.extra_data` that feeds it; None for `config.data`.
    """

    name: str
    objective: Objective
    weight: Weight = Weight()
    data: str | None = None

    @property
    def key(self) -> str:
        """Its name in the state of the sum, where a slash would be a branch."""
        return self.name.replace("/", ".")

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


class Objective(Protocol):
    """A frozen dataclass of Flax modules and numbers, which names this class as its base.

    The loss is computed in three stages, so that a batch can be computed in microbatches and
    several losses can share a forward pass. Most objectives have `forward` alone.

    Attributes:
      model: the Flax module, or the first of several.
      compute_dtype: of the matrix products, for the peak that MFU is measured against.
      reads: the fields of a batch that the loss takes, by name.
    """

    model: nn.Module

    @property
    def couples_batch(self) -> bool:
        """Whether the loss of an example depends on the others, as a contrastive one does."""
        return type(self).reduce is not Objective.reduce

    @property
    def compute_dtype(self) -> Any:
        """The type that the image tower computes in."""
        return self.model.image.compute.dtype

    @property
    def reads(self) -> Mapping[str, Field]:
        """See the class."""

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Fresh parameters, in `nn.LogicallyPartitioned` boxes. Can be jitted.

        Raises:
          ValueError: a field of the batch is not what is read.
        """
        for name, field in self.reads.items():
            if name in batch_spec:
                field.check(name, batch_spec[name])
        return self.model.init(rng, *self.model.example())["params"]

    def init_state(self, batch_spec: BatchSpec) -> State:
        """A tree of arrays that are neither trained nor constant, such as a queue or an average.

        In boxes they are spread by their names; bare ones lie whole on each device. Empty for most
        objectives. Can be jitted.
        """
        del batch_spec
        return {}

    def draw(self, batch: Batch, context: Context) -> Examples:
        """The fields that `forward` takes, with what is drawn at random for each example.

        It sees the whole batch, so that what is drawn does not depend on the microbatches.
        """
        del context
        return {name: batch[name] for name in self.reads}

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """What is computed of each example by itself: of what `draw` gave, or of a part of it.

        For an objective without a `reduce` of its own it is the metrics of each example:
        name -> (sum, count), both [batch], with the loss under "loss". Counts follow from the batch
        alone, never from the parameters.
        """

    def reduce(
        self, params: Params, examples: Examples, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """The scalar to minimize, and what else is worth knowing, from all that `forward` gave."""
        del params, context
        metrics = {name: (total.sum(), count.sum()) for name, (total, count) in examples.items()}
        total, count = metrics["loss"]
        mean = total / jnp.where(count == 0, 1, count)  # of a batch without anything to learn: 0
        return mean, LossOutput(metrics)

    def loss(
        self, params: Params, batch: Batch, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """The three stages, one after the other."""
        examples = self.forward(params, self.draw(batch, context), context)
        return self.reduce(params, examples, context)

    def functions(self) -> dict[str, Function]:
        """Functions of the model for evaluators, exports and users, by name."""

    def parts(self) -> dict[str, Part]:
        """All objectives of a sum by name; an objective that is no sum has itself under ""."""
        return {"": Part("", self)}

    def switches(self) -> tuple[int, ...]:
        """The steps from which on another sum is computed; see `at`."""
        return ()

    def at(self, step: int) -> Self:
        """The objective without the parts whose weight is 0 at this step, up to the next switch."""
        del step
        return self


# The operations of `data.preprocess` that make a field of this kind.
_MADE_BY = {
    PIXELS: ", by decode_image and a resize or crop",
    TOKENS: ", by tokenize (a string 'text' needs config.tokenizer alone)",
}


def check_reads(objective: Objective, batch_spec: BatchSpec) -> None:
    """Raises ValueError if a batch lacks a field that is read, or has another in its place."""
    for part in objective.parts().values():
        spec = part.fields(batch_spec)
        for name, field in part.objective.reads.items():
            if name not in spec:
                who = f"part {part.name!r}" if part.name else "the objective"
                raise ValueError(
                    f"it has no {name!r}, which {who} reads ({field.kind}; there are: "
                    f"{', '.join(sorted(spec))}); name it by data.fields, or let data.preprocess "
                    f"make it{_MADE_BY.get(field.kind, '')}"
                )
            field.check(name, spec[name])

"""The interface between a task (a model with its loss) and the loop, evaluators and export."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

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
# A field of a dataset in config.extra_data is called DATASET/FIELD in a batch.
SEPARATOR = "/"


@dataclasses.dataclass(frozen=True)
class Field:
    """Describes a field of an example that an objective reads.

    Attributes:
      kind: "pixels": [height, width, 3] with values in [0, 255]; "tokens": a row of token ids;
        "labels": the number of a class, or one share for each class.
      shape: the shape of one example; () for labels.
      dtype: the dtype in the data; int32 for labels.
      classes, told_by: the number of classes, and the key of the config that gives it.
    """

    kind: str
    shape: tuple[int, ...] = ()
    dtype: Any = jnp.int32
    classes: int | None = None
    told_by: str = ""

    @classmethod
    def pixels(cls, image_size: tuple[int, int]) -> Field:
        """Makes the field of a model that takes images of this height and width."""
        return cls(PIXELS, (*image_size, 3), jnp.uint8)

    @classmethod
    def tokens(cls, length: int) -> Field:
        """Makes the field of a model that takes texts of `length` tokens."""
        return cls(TOKENS, (length,))

    @classmethod
    def labels(cls, classes: int, told_by: str) -> Field:
        """Makes the field of a model that distinguishes `classes` classes."""
        return cls(LABELS, classes=classes, told_by=told_by)

    def check(self, name: str, spec: jax.ShapeDtypeStruct) -> None:
        """Raises ValueError if the field `name` of a batch does not fit this description."""
        shape = tuple(spec.shape[1:])
        actual = f"{jnp.dtype(spec.dtype).name}{list(shape)}"
        if self.kind == LABELS:
            hard = jnp.issubdtype(spec.dtype, jnp.integer) and not shape
            soft = jnp.issubdtype(spec.dtype, jnp.floating) and len(shape) == 1
            if not hard and not soft:
                raise ValueError(f"{name!r} holds no classes: it is {actual} an example")
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
            raise ValueError(f"{name!r} is {actual} an example, and the model takes {wanted}")


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, since jax.jit needs a hash
class Function:
    """A function of the model that evaluators, exports and users may call.

    Attributes:
      call: `call(params, array)`, or for several fields `call(params, {name: array})`.
      inputs: field -> its kind, for each field of a batch that the function takes; may be empty.
      output: the result, in words.
    """

    call: Callable[..., Any]
    inputs: Mapping[str, str]
    output: str

    def __call__(self, params: Params, inputs: Any, **settings: Any) -> Any:
        """Calls the function; `settings` override the defaults of its keyword arguments."""
        return self.call(params, inputs, **settings)


def of_images(call: Callable[..., Array], output: str) -> Function:
    """Makes a `Function` of images with values in [0, 255]."""
    return Function(call, {"image": PIXELS}, output)


def of_texts(call: Callable[..., Array], output: str) -> Function:
    """Makes a `Function` of token ids."""
    return Function(call, {"text": TOKENS}, output)


@dataclasses.dataclass(frozen=True)
class Context:
    """Arguments of a loss beside parameters and batch.

    Attributes:
      rng: the random key of this step.
      train: True in training. False turns off dropped layers, smoothing and other randomness of
        training.
      step: steps done before this batch.
      ema_params: the moving average of the parameters before this step; None without an average.
      state: the state that the previous loss returned, at first the result of `init_state`; in
        evaluation always a fresh one.
    """

    rng: PRNGKeyArray
    train: bool = True
    step: Int[Array, ""] | int = 0
    ema_params: Params | None = None
    state: State = dataclasses.field(default_factory=dict)

    def of_part(self, index: int, part: Part) -> Context:
        """Returns the context of one part of a composite, with its own random key and state."""
        rng = jax.random.fold_in(self.rng, index)
        return dataclasses.replace(self, rng=rng, state=self.state.get(part.key, {}))


class LossOutput(NamedTuple):
    """Metrics, name -> (sum, count), and the state for the next step, {} for no state."""

    metrics: Metrics
    state: State = {}


@dataclasses.dataclass(frozen=True)
class Part:
    """One objective of a weighted sum, with its weight and its dataset.

    `name` is the prefix of its metrics, "" if it is not part of a sum; `data` names a dataset in
    `config.extra_data`, None for `config.data`.
    """

    name: str
    objective: Objective
    weight: Weight = Weight()
    data: str | None = None

    @property
    def key(self) -> str:
        """The name as a key in trees of the sum, where a slash would separate levels."""
        return self.name.replace("/", ".")

    def fields(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Selects this part's fields of a batch, by plain names; ValueError if it has no data."""
        if self.data is None:
            return {name: value for name, value in batch.items() if SEPARATOR not in name}
        prefix = self.data + SEPARATOR
        fields = {k.removeprefix(prefix): v for k, v in batch.items() if k.startswith(prefix)}
        if not fields:
            raise ValueError(
                f"part {self.name!r} is fed from {self.data!r}, which config.extra_data lacks"
            )
        return fields


@runtime_checkable
class Objective(Protocol):
    """A model with its loss: a frozen dataclass of Flax modules and numbers, with this base class.

    The loss has three stages: `draw`, `forward` and `reduce`. Because of the stages a batch can be
    computed in microbatches, and several losses can share a forward pass. Most objectives define
    `forward` alone.

    Attributes:
      model: the Flax module, or the first of several.
      compute_dtype: dtype of the matrix products; MFU is measured against its peak.
      reads: the fields of a batch that the loss takes, by name.
    """

    model: nn.Module

    @property
    def couples_batch(self) -> bool:
        """Whether an example's loss depends on other examples, as a contrastive loss does."""
        return type(self).reduce is not Objective.reduce

    @property
    def compute_dtype(self) -> Any:
        """The dtype in which the image tower computes."""
        return self.model.image.compute.dtype

    @property
    def reads(self) -> Mapping[str, Field]:
        """The fields of a batch that the loss takes, by name."""

    def init(self, rng: PRNGKeyArray, batch_spec: BatchSpec) -> Params:
        """Makes fresh boxed parameters, also under jit; ValueError if the batch does not fit."""
        for name, field in self.reads.items():
            if name in batch_spec:
                field.check(name, batch_spec[name])
        return self.model.init(rng, *self.model.example())["params"]

    def init_state(self, batch_spec: BatchSpec) -> State:
        """Makes the arrays that are neither trained nor constant, such as a queue or an average.

        Arrays in `nn.LogicallyPartitioned` boxes are sharded by their axis names; other arrays are
        sharded over `fsdp` where it divides them. {} for most objectives. Can be jitted.
        """
        del batch_spec
        return {}

    def draw(self, batch: Batch, context: Context) -> Examples:
        """Returns the input of `forward`: the fields of the batch, and random draws such as masks.

        It gets the whole batch, so the draws do not depend on the number of microbatches.
        """
        del context
        return {name: batch[name] for name in self.reads}

    def forward(self, params: Params, batch: Examples, context: Context) -> Examples:
        """Computes everything that does not couple examples, from some of the results of `draw`.

        An objective that does not define `reduce` returns the metrics of each example: name ->
        (sum, count), both [batch], with the loss under "loss". Counts must depend on the batch
        alone, never on the parameters.
        """

    def reduce(
        self, params: Params, examples: Examples, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """Computes the loss of the whole batch, and its metrics, from the results of `forward`."""
        del params, context
        metrics = {name: (total.sum(), count.sum()) for name, (total, count) in examples.items()}
        total, count = metrics["loss"]
        mean = total / jnp.where(count == 0, 1, count)  # a batch of empty texts has the loss 0
        return mean, LossOutput(metrics)

    def loss(
        self, params: Params, batch: Batch, context: Context
    ) -> tuple[Float[Array, ""], LossOutput]:
        """Computes the loss of a batch: `draw`, `forward` and `reduce`, one after the other."""
        examples = self.forward(params, self.draw(batch, context), context)
        return self.reduce(params, examples, context)

    def functions(self) -> dict[str, Function]:
        """Returns the functions of the model for evaluators, exports and users, by name."""

    def parts(self) -> dict[str, Part]:
        """Returns the objectives of a sum by name; {"": this objective} if it is not a sum."""
        return {"": Part("", self)}

    def switches(self) -> tuple[int, ...]:
        """Returns the steps at which parts of a sum begin or end; see `at`."""
        return ()

    def at(self, step: int) -> Objective:
        """Returns the objective without the parts of weight 0 from `step` to the next switch."""
        del step
        return self


# For errors: the operations of `data.preprocess` that make a field of each kind.
_MADE_BY = {
    PIXELS: ", by decode_image and a resize or crop",
    TOKENS: ", by tokenize (a string 'text' needs config.tokenizer alone)",
}


def check_reads(objective: Objective, batch_spec: BatchSpec) -> None:
    """Raises ValueError if a field that `objective` reads is missing or does not fit."""
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

"""The base of evaluators: outcomes, shared resources, and embeddings gathered on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.wording import Wording
from vlp_jax.errors import UserError
from vlp_jax.objectives.base import Function
from vlp_jax.observe.samples import Sample
from vlp_jax.parallel import agreement, rules
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch

MAX_BYTES = 2**31  # of all cached arrays


class EmbeddingCache:
    """Caches at most `max_bytes` of arrays by key, for one set of parameters; off unless `open`."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._params: Any = None
        self._arrays: dict[Hashable, np.ndarray] | None = None  # None while it is off

    @contextlib.contextmanager
    def open(self, params: Any) -> Iterator[None]:
        """Turns the cache on for `params` (this very object) within the context; may be nested."""
        before = self._params, self._arrays
        # By identity: to compare parameters would cost more than the cache saves.
        if self._arrays is None or self._params is not params:
            self._params, self._arrays = params, {}
        try:
            yield
        finally:
            self._params, self._arrays = before

    @property
    def bytes(self) -> int:
        """The size of the cached arrays."""
        return sum(array.nbytes for array in (self._arrays or {}).values())

    def get(self, params: Any, key: Hashable) -> np.ndarray | None:
        """Returns the array under `key` for `params`; None if it is not cached."""
        return None if self._arrays is None or params is not self._params else self._arrays.get(key)

    def put(self, params: Any, key: Hashable, array: np.ndarray) -> None:
        """Caches `array` if the cache is open for `params` and has room; makes it read-only."""
        if self._arrays is None or params is not self._params:
            return
        if self.bytes + array.nbytes <= self._max_bytes:
            array.flags.writeable = False  # evaluators share it, so none of them may change it
            self._arrays[key] = array


def key_of(value: Any) -> Hashable:
    """Makes a key from a value of a config: equal for equal values, by identity for arrays."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return ("mapping", *sorted((str(k), key_of(v)) for k, v in value.items()))
    if isinstance(value, list | tuple):
        return ("sequence", *(key_of(item) for item in value))
    if isinstance(value, np.ndarray):
        return ("array", id(value))
    return (type(value).__name__, str(value))


INDEX = "_index"  # among the fields of `Resources.embed`: the position of an example in its data
NUMBER = "number"  # a field that evaluators add: the number of an example in its split
Pairs = Iterator[tuple[str, float]]
# Changes a batch on the devices before a function gets it, such as a corruption.
Change = Callable[[dict[str, Array]], dict[str, Array]]
SHOWN = 8  # samples that an outcome shows


class Outcome:
    """The result of an evaluator on a whole split: scores, the arrays behind them, and samples.

    Attributes:
      saved: fields from which the scores can be computed again.
    """

    saved: ClassVar[tuple[str, ...]] = ()

    def scores(self) -> dict[str, float]:
        """Computes name -> value of every score."""
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """Returns the fields `saved` as arrays, without those that are None."""
        values = {name: getattr(self, name) for name in self.saved}
        return {name: np.asarray(value) for name, value in values.items() if value is not None}

    def samples(self) -> Sequence[Sample]:
        """Returns a few examples for TensorBoard, Weights & Biases and the report."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Outcome):
    """An outcome that has scores alone, without arrays."""

    values: Mapping[str, float]

    def scores(self) -> dict[str, float]:
        """Returns name -> value of every score."""
        return dict(self.values)


class Evaluator:
    """Scores parameters on a split.

    Attributes:
      needs: names of the objective's functions that it calls.
      reads_text: True if it embeds the texts of its data.
      SMOKE: arguments that replace the config's in a smoke test, to make it small.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {}
    needs: tuple[str, ...] = ()
    reads_text = False

    def outcome(self, params: Any) -> Outcome:
        """Evaluates `params`; NoScores if the data cannot be scored. All processes must call it."""
        return Scores(dict(self.pairs(params)))

    def pairs(self, params: Any) -> Pairs:
        """Yields (name, value) of every score. Implemented by evaluators without an `outcome`."""
        raise NotImplementedError

    def __call__(self, params: Any) -> Pairs:
        """Yields (name, value) of every score of `params`."""
        yield from self.outcome(params).scores().items()


@dataclasses.dataclass(frozen=True)
class Resources:
    """Everything that the evaluators of one run share, such as compiled functions.

    Attributes:
      functions: the objective's functions, compiled by `compile_functions`.
      mesh: the devices over which a batch is split.
      batch_size: examples of an evaluation batch, over the whole mesh.
      wording: the run's operations on texts; see `vlp_jax.data.wording`.
      cache: embeddings that several evaluators need, within `one_evaluation`.
      train_data: the data config of training, which numbers the model's classes; None if the
        evaluation data numbers them alike.
    """

    functions: Mapping[str, CompiledFunction]
    tokenizer: Any
    mesh: Mesh
    batch_size: int
    wording: Wording = Wording()
    cache: EmbeddingCache = dataclasses.field(default_factory=EmbeddingCache)
    train_data: Mapping[str, Any] | None = None

    @contextlib.contextmanager
    def one_evaluation(self, params: Any) -> Iterator[None]:
        """Lets evaluators of the same data share embeddings by `params`, within this context."""
        with self.cache.open(params):
            yield

    def check_function(self, name: str) -> str:
        """Returns `name`; raises UserError if the objective has no such function."""
        if name not in self.functions:
            known = ", ".join(sorted(self.functions)) or "none"
            raise UserError(f"the objective has no function {name!r} (it has: {known})")
        return name

    def logit_scale(self, params: Any) -> float | None:
        """Returns the model's factor on the cosine similarity; None if the objective has none."""
        if "logit_scale" not in self.functions:
            return None
        unused = jax.device_put(np.zeros((), np.float32), mesh_lib.replicated(self.mesh))
        return float(jax.device_get(self.functions["logit_scale"](params, unused, {})[0]))

    def pipeline(self, data: Mapping[str, Any], extra_fields: Sequence[str] = ()) -> EvalPipeline:
        """Opens `data` as a pipeline that yields each example once."""
        return EvalPipeline(
            data,
            self.tokenizer,
            batch_size=self.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            extra_fields=extra_fields,
            gather=agreement.gather,
        )

    def embed(
        self,
        params: Any,
        batches: Iterator[Mapping[str, np.ndarray]],
        functions: Mapping[str, str],
        keep: Sequence[str] = (),
    ) -> tuple[dict[str, Float[np.ndarray, "n ..."]], dict[str, np.ndarray]]:
        """Applies functions to fields of all batches, in one pass over the data.

        Args:
          functions: field -> the name of the function to apply to it.
          keep: further fields to return. Other fields are dropped batch by batch, to save memory.

        Returns:
          The outputs by field, and the fields `keep` with `INDEX` (the position of each example in
          the data, int64 [n]), without padding. Every process gets all rows, in the same order.
        """

        def run(rest: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
            arrays, results = {field: rest.pop(field) for field in functions}, {}
            for field, name in functions.items():
                # `rest` passes through each function, because the function's out_shardings gather
                # it: afterwards every process can fetch the rows of all.
                results[field], rest = self.functions[name](params, arrays[field], rest)
            return results, rest

        return self._gathered(batches, (*functions, *keep), run)

    def outputs(
        self,
        params: Any,
        batches: Iterable[Mapping[str, np.ndarray]],
        function: str,
        inputs: Sequence[str],
        keep: Sequence[str] = (),
        change: Change = dict,
        more: Mapping[str, Any] | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Applies one function to several fields of all batches; returns what `embed` returns.

        Args:
          inputs: the fields that the function takes; it takes a single one as a bare array.
          change: changes each batch of the fields `inputs` and `keep` on the devices, before.
          more: further inputs of the function, the same for every batch.
        """

        def run(rest: dict[str, Array]) -> tuple[dict[str, Array], dict[str, Array]]:
            rest = change(rest)
            taken = {name: rest.pop(name) for name in inputs}
            argument = {**taken, **(more or {})} if more or len(inputs) > 1 else taken[inputs[0]]
            output, rest = self.functions[function](params, argument, rest)
            return {"": output}, rest

        outputs, fields = self._gathered(batches, (*inputs, *keep), run)
        return outputs[""], fields

    def _gathered(
        self, batches: Iterable[Mapping[str, np.ndarray]], names: Sequence[str], run: Callable
    ) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """Puts fields of each batch on the devices, and joins the rows of `run` that count."""
        outputs, fields = [], []
        for number, batch in enumerate(batches):
            results, rest = jax.device_get(run(put_batch(chosen(batch, names), self.mesh)))
            mask = rest.pop("mask")  # False for padding and for examples that cannot be used
            outputs.append({name: value[mask] for name, value in results.items()})
            fields.append({name: value[mask] for name, value in rest.items()})
            # The mask is the global batch's by now, and all batches before had its length.
            fields[-1][INDEX] = np.flatnonzero(mask) + number * len(mask)
        return _concatenated(outputs), _concatenated(fields)

    def tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        """Tokenizes texts from outside of the data, after the run's operations on texts."""
        return self.tokenizer(self.wording(texts))

    def embed_texts(self, params: Any, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Embeds texts from outside of the data (see `tokens`). All processes pass all texts."""
        tokens = self.tokens(texts)
        local = self.batch_size // jax.process_count()
        start = jax.process_index() * local

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for first in range(0, len(tokens), self.batch_size):
                rows = first + start + np.arange(local)
                # Batches of one size need one compilation; the last one repeats its last text.
                yield {
                    "text": tokens[np.minimum(rows, len(tokens) - 1)],
                    "mask": rows < len(tokens),
                }

        return self.embed(params, batches(), {"text": "embed_text"})[0]["text"]


def chosen(batch: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """Selects the named fields of a batch, and its mask."""
    return {name: batch[name] for name in (*dict.fromkeys(names), "mask")}


def _concatenated(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledFunction:
    """A jitted function of the objective: `(params, array, rest) -> (output, rest)`.

    The results are replicated, so that each process can fetch them whole.
    """

    function: Function
    mesh: Mesh

    @functools.cached_property
    def _jitted(self) -> Callable[..., Any]:
        return jax.jit(
            lambda params, array, rest: (self.function(params, array), rest),
            out_shardings=mesh_lib.replicated(self.mesh),
        )

    def having(self, **settings: Any) -> CompiledFunction:
        """Returns the function with other values for its keyword arguments."""
        call = functools.partial(self.function.call, **settings)
        return CompiledFunction(dataclasses.replace(self.function, call=call), self.mesh)

    def __call__(self, params: Any, array: Any, rest: dict[str, Array]) -> Any:
        """Runs the function; compiles it first for new shapes."""
        with rules.use_mesh(self.mesh):
            return self._jitted(params, array, rest)


def compile_functions(functions: Mapping[str, Function], mesh: Mesh) -> dict[str, CompiledFunction]:
    """Wraps each function for the mesh. Compilation happens at the first call."""
    return {name: CompiledFunction(function, mesh) for name, function in functions.items()}

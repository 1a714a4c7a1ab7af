"""What evaluators share: embeddings of a whole split, gathered on the host."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from vlp_jax.data.pipeline import EvalPipeline
from vlp_jax.data.wording import Wording
from vlp_jax.errors import UserError
from vlp_jax.evaluators.cache import EmbeddingCache
from vlp_jax.objectives.base import Function
from vlp_jax.observe.samples import Sample
from vlp_jax.parallel import agreement, rules
from vlp_jax.parallel import mesh as mesh_lib
from vlp_jax.parallel.batch import put_batch

INDEX = "_index"  # the place of an example in its data, among the fields of `Resources.embed`
Pairs = Iterator[tuple[str, float]]
SHOWN = 8  # samples of a split


class Outcome:
    """The result of an evaluator on a whole split: scores, the arrays behind them, and samples."""

    def scores(self) -> dict[str, float]:
        """Name -> value."""
        raise NotImplementedError

    def arrays(self) -> dict[str, np.ndarray]:
        """Everything from which the scores can be computed again, for `save_embeddings`."""
        return {}

    def samples(self) -> Sequence[Sample]:
        """A few examples for TensorBoard, Weights & Biases and the report."""
        return ()


@dataclasses.dataclass(frozen=True, eq=False)
class Scores(Outcome):
    """Scores that come without arrays."""

    values: Mapping[str, float]

    def scores(self) -> dict[str, float]:
        """Name -> value."""
        return dict(self.values)


class Evaluator:
    """Judges parameters on a split.

    Attributes:
      needs: names of the objective's functions that it calls.
      reads_text: True if it embeds the texts of its data.
      SMOKE: arguments that make it small, in the place of those that a config gives.
    """

    SMOKE: ClassVar[Mapping[str, Any]] = {}
    needs: tuple[str, ...] = ()
    reads_text = False

    def outcome(self, params: Any) -> Outcome:
        """The scores of `params` and what lies behind them. Called on every process.

        Raises:
          NoScores: the data cannot be scored.
        """
        return Scores(dict(self.pairs(params)))

    def pairs(self, params: Any) -> Pairs:
        """(name, value) of every score, of an evaluator without an outcome of its own."""
        raise NotImplementedError

    def __call__(self, params: Any) -> Pairs:
        """(name, value) of every score of `params`."""
        yield from self.outcome(params).scores().items()


@dataclasses.dataclass(frozen=True)
class Resources:
    """What the evaluators of one run share. Functions are compiled once for all of them.

    Attributes:
      functions: the objective's, jitted by `compile_functions`.
      tokenizer: that of the run.
      mesh: devices over which a batch is spread.
      batch_size: examples of an evaluation batch, over the whole mesh.
      wording: how the run words its texts; see `vlp_jax.data.wording`.
      cache: embeddings that several evaluators ask for, within `one_evaluation`.
      train_data: the data config that the model was trained on, whose classes it tells; None if
        they are those of the data that it is evaluated on.
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
        """Inside, evaluators that look at the same data with these `params` embed it once.

        Nothing is kept after it, and nothing is shared without it.
        """
        with self.cache.open(params):
            yield

    def check_function(self, name: str) -> str:
        """`name`; raises UserError if the objective has no such function."""
        if name not in self.functions:
            known = ", ".join(sorted(self.functions)) or "none"
            raise UserError(f"the objective has no function {name!r} (it has: {known})")
        return name

    def logit_scale(self, params: Any) -> float | None:
        """The model's factor on the cosine similarity; None if the objective has none."""
        if "logit_scale" not in self.functions:
            return None
        unused = jax.device_put(np.zeros((), np.float32), mesh_lib.replicated(self.mesh))
        return float(jax.device_get(self.functions["logit_scale"](params, unused, {})[0]))

    def pipeline(self, data: Mapping[str, Any], extra_fields: Sequence[str] = ()) -> EvalPipeline:
        """The examples of `data`, each once."""
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
    ) -> tuple[dict[str, Float[np.ndarray, "n dim"]], dict[str, np.ndarray]]:
        """What `functions` (field -> name of a function) make of their fields, in one pass.

        Args:
          keep: further fields of all batches that are wanted; nothing else stays on the host.

        Returns:
          The outputs by field, and the fields `keep`, both without padding, and among these as
          `INDEX` the place of each example in the data: int64 [n]. Every process gets the rows of
          all, in one order.
        """
        outputs, fields = [], []
        for number, batch in enumerate(batches):
            rest = put_batch(chosen(batch, (*functions, *keep)), self.mesh)
            arrays = {field: rest.pop(field) for field in functions}
            made = {}
            for field, name in functions.items():
                made[field], rest = self.functions[name](params, arrays[field], rest)
            made, rest = jax.device_get((made, rest))
            sound = rest.pop("mask")
            outputs.append({name: value[sound] for name, value in made.items()})
            fields.append({name: value[sound] for name, value in rest.items()})
            fields[-1][INDEX] = np.flatnonzero(sound) + number * len(sound)
        return _concatenated(outputs), _concatenated(fields)

    def tokens(self, texts: Sequence[str]) -> Int[np.ndarray, "n context"]:
        """Token ids of texts that are not from the data, worded as the run words its own."""
        return self.tokenizer(self.wording(texts))

    def embed_texts(self, params: Any, texts: Sequence[str]) -> Float[np.ndarray, "n dim"]:
        """Unit vectors of texts, worded as in `tokens`, that every process holds whole."""
        tokens = self.tokens(texts)
        local = self.batch_size // jax.process_count()
        start = jax.process_index() * local

        def batches() -> Iterator[dict[str, np.ndarray]]:
            for first in range(0, len(tokens), self.batch_size):
                rows = first + start + np.arange(local)
                yield {
                    "text": tokens[np.minimum(rows, len(tokens) - 1)],
                    "mask": rows < len(tokens),
                }

        return self.embed(params, batches(), {"text": "embed_text"})[0]["text"]


def chosen(batch: Mapping[str, np.ndarray], names: Iterable[str]) -> dict[str, np.ndarray]:
    """The named fields of a batch, and its mask."""
    return {name: batch[name] for name in (*dict.fromkeys(names), "mask")}


def _concatenated(batches: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


@dataclasses.dataclass(frozen=True, eq=False)
class CompiledFunction:
    """A function of the objective as a program, `g(params, array, rest) -> (output, rest)`.

    What comes out lies whole on every device, so that each process can fetch all of it.

    Attributes:
      function: what was compiled.
      mesh: the devices.
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
        """The same function with other settings than its defaults."""
        call = functools.partial(self.function.call, **settings)
        return CompiledFunction(dataclasses.replace(self.function, call=call), self.mesh)

    def __call__(self, params: Any, array: Any, rest: dict[str, Array]) -> Any:
        """Compiles it for shapes that are new, and starts it."""
        with rules.use_mesh(self.mesh):
            return self._jitted(params, array, rest)


def compile_functions(functions: Mapping[str, Function], mesh: Mesh) -> dict[str, CompiledFunction]:
    """Each function as a program on the mesh; it costs nothing until it is called."""
    return {name: CompiledFunction(function, mesh) for name, function in functions.items()}

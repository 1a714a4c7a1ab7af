"""The scores of an exported model: from its run's metrics, or evaluated anew."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict

from vlp_jax.handover.artifacts import artifact_functions
from vlp_jax.interop import precision
from vlp_jax.interop.base import Extras
from vlp_jax.interop.transfer import Model
from vlp_jax.observe.jsonl import METRICS_FILE, read_metrics
from vlp_jax.observe.throughput import StartupClock
from vlp_jax.training.build import build
from vlp_jax.training.restore import SavedParameters

PREFIX = "eval/"
# Names that evaluators report and that are no scores.
NO_SCORES = ("examples", "classes", "pairs", "chance", "chance_r1")
RANDOM_INPUTS = 16  # number of inputs whose embeddings are compared before and after rounding


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a model.

    Attributes:
      values: "EVALUATOR/SCORE" -> value; also the counts and chances that evaluators report.
      source: the origin of the scores, for people.
      step: the step of the evaluated state.
    """

    values: dict[str, float]
    source: str
    step: int


def is_score(name: str) -> bool:
    """Whether a name belongs to a score, and not to a count or to chance."""
    return name.rpartition("/")[2] not in NO_SCORES


def noted(workdir: epath.Path, step: int) -> Scores | None:
    """Reads the scores nearest to a step from a run's metrics.jsonl; None if there are none.

    Of two equally near steps, the earlier one counts. A resumed run may have logged a step twice;
    then the last record counts.
    """
    file = workdir / METRICS_FILE
    by_step: dict[int, dict[str, float]] = {}
    for record in read_metrics(file) if file.exists() else ():
        for name, value in record.items():
            if name.startswith(PREFIX) and isinstance(value, int | float):
                values = by_step.setdefault(record["step"], {})
                values[name.removeprefix(PREFIX)] = float(value)
    if not by_step:
        return None
    nearest = min(by_step, key=lambda at: (abs(at - step), at))
    return Scores(by_step[nearest], f"noted by the run at step {nearest:,}", nearest)


def evaluate_rounded(
    workdir: epath.Path, config: ConfigDict, saved: SavedParameters, weights: str
) -> tuple[Scores, Scores | None]:
    """Runs the run's evaluators on parameters, before and after rounding (None for float32).

    Raises UserError if the data is missing, or see `build`.
    """
    parts = build(config, workdir, StartupClock())
    params = saved.load(parts.setup.abstract.params).params

    def run(params: Any, source: str) -> Scores:
        values = {
            f"{evaluation.name}/{score}": value
            for evaluation in parts.evaluations
            for score, value in evaluation.evaluator(params)
        }
        return Scores(values, source, saved.step)

    def rounded(path: tuple, x: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return jax.device_put(precision.rounded({name: np.asarray(x)}, weights)[name], x.sharding)

    before = run(params, "evaluated on export")
    if weights == "float32":
        return before, None
    params = jax.tree_util.tree_map_with_path(rounded, params)
    return before, run(params, f"evaluated on export, weights in {weights}")


def table(before: Scores, after: Scores | None) -> list[str]:
    """Formats scores as lines; with two sets of scores, adds the drop."""
    names = [name for name in before.values if is_score(name)]
    width = max((len(name) for name in names), default=0)
    if after is None:
        return [f"  {name:<{width}}  {before.values[name]:.4f}" for name in names]
    lines = [f"  {'score':<{width}}  float32  rounded    drop"]
    for name in names:
        one, other = before.values[name], after.values[name]
        lines.append(f"  {name:<{width}}  {one:7.4f}  {other:7.4f}  {one - other:+.4f}")
    return lines


def cosines(model: Model, extras: Extras) -> dict[str, float]:
    """Computes the least cosine between embeddings of random inputs before and after rounding.

    Returns:
      Function -> cosine, for each embedding function.
    """
    whole = dataclasses.replace(extras, weights="float32")
    rng, least = np.random.default_rng(0), {}
    pairs = [artifact_functions(model.module, model.params, x) for x in (whole, extras)]
    for pair in zip(*pairs, strict=True):
        if not pair[0].name.startswith("embed"):
            continue
        (field,) = pair[0].inputs
        high = 256 if field.dtype == "uint8" else model.module.text.vocab_size
        x = rng.integers(0, high, (RANDOM_INPUTS, *field.shape)).astype(field.dtype)
        a, b = (
            # float64, because these cosines are close to 1, where float32 has few digits left.
            np.asarray(jax.jit(f.call)(f.weights, x), np.float64).reshape(RANDOM_INPUTS, -1)
            for f in pair
        )
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        least[pair[0].name] = float(np.min(np.sum(a * b, axis=1) / norms))
    return least

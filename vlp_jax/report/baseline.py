"""The baseline of a report: another run, or given numbers."""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence

from etils import epath

from vlp_jax.errors import UserError, unknown_key_message
from vlp_jax.files import read_text
from vlp_jax.report.run_record import RunRecord
from vlp_jax.report.scores import PREFIX, by_evaluator


@dataclasses.dataclass(frozen=True)
class Baseline:
    """Scores to compare with, EVALUATOR/NAME -> value, and their run; None for given numbers."""

    title: str
    scores: Mapping[str, float]
    run: RunRecord | None = None

    def unknown(self, scores: Iterable[str]) -> list[str]:
        """Names given numbers that were not evaluated, a line each, with the nearest score."""
        if self.run is not None:
            return []
        known, lines = sorted(scores), []
        for key in self.scores:
            if key not in known:
                # Half of the letters alike: names of scores share long beginnings.
                nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                hint = f"; did you mean {nearest[0].removeprefix(PREFIX)!r}?" if nearest else ""
                lines.append(
                    f"the baseline has {key.removeprefix(PREFIX)!r}, which was not evaluated{hint}"
                )
        return lines


def read_baseline(path: str | os.PathLike[str], evaluators: Sequence[str]) -> Baseline:
    """Reads the workdir of another run, or a JSON file {"zero_shot/top1": 0.9, ...}.

    Raises:
      UserError: the path is neither, the run has no scores, or the file names another evaluator
        than `evaluators` or holds a value that is no number.
    """
    place = epath.Path(path)
    if not place.exists():
        raise UserError(f"--baseline {path} does not exist: give a workdir or a JSON file")
    if place.is_dir():
        run = RunRecord.read(path)
        scores, steps = run.last_scores()
        if not scores:
            raise UserError(
                f"--baseline {path}: this run has no scores yet; evaluate it with "
                f"python -m vlp_jax.evaluate --workdir {path} --all"
            )
        span = f"{steps[-1]:,}" if len(steps) == 1 else f"{steps[0]:,} to {steps[-1]:,}"
        return Baseline(f"{run.path}, step {span}", scores, run)
    return Baseline(os.fspath(path), _numbers(place, evaluators))


def _numbers(file: epath.Path, evaluators: Sequence[str]) -> dict[str, float]:
    try:
        given = json.loads(read_text(file, "--baseline"))
    except ValueError as error:
        raise UserError(f"--baseline {file} is no JSON: {error}") from None
    if not isinstance(given, dict) or not given:
        raise UserError(f'--baseline {file} must be an object like {{"zero_shot/top1": 0.9}}')
    scores = {}
    for key, value in given.items():
        if key == "step":
            continue  # as `vlp_jax.evaluate --output` writes
        # In Python True is an int.
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value):
            raise UserError(f"--baseline {file}: {key} is {value!r}, not a number")
        scores[PREFIX + key.removeprefix(PREFIX)] = float(value)
    for key in scores:
        if key.count("/") < 2:
            raise UserError(f"--baseline {file}: {key!r} must be EVALUATOR/SCORE")
    for name in by_evaluator(scores):
        if name not in evaluators:
            raise UserError(unknown_key_message(name, evaluators, f"--baseline {file}"))
    return scores
